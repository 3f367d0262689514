"""A decode step of whole engines, by batch: our own step against the same model on vLLM's operators, and the limit.

    python benchmarks/bench_decode.py --shape 9b
    python benchmarks/bench_decode.py --shape 9b --variants fused fused_slots --batches 128
    python benchmarks/bench_decode.py --shape 9b --variants vllm_operators fused --batches 128 --profile /tmp/profile
    python benchmarks/bench_decode.py --shape 9b --variants fused fused_slots --batches 128 --offline 4 --cache-gib 38

Every variant is an engine in a process of its own, and all of them are ready before the first is timed: they take turns
batch by batch on the same GPU. A step is the time that a longer answer takes more than a shorter one, over the tokens
that it has more; prompts and everything that happens once a request cancel out. No prompt is sent twice to an engine,
so that what prefix caching costs is seen where it finds nothing. Weights are random.

Prompts are of one length, so that with prefix slots all requests pass the end of a block of states in the same step:
the most that the host can have to do at once. With --prompts mixed they are of 16 lengths, as users' are of all.

With --drafts tokens are drafted by n-grams. Random weights repeat themselves, so most drafts are right; a step is still
what a token takes.

With --offline whole runs are timed, prefills included: several times as many requests as a batch has, all at once.
Give all engines the same cache then (--cache-gib): by default each has what requests that run need, and none to spare.
"""

import argparse
import itertools
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from shapes import SHAPES, Bytes, bamba_config, bytes_moved, random_prompts, write_model
from timing import Limits, Samples, measure_limits
from transformers import PreTrainedConfig
from variants import (
    VARIANTS,
    Variant,
    add_engine_arguments,
    engine_options,
    fused_format,
    kernel_milliseconds,
    profiler_options,
    running,
)

PROMPT, SPREAD = 32, 16  # tokens of the shortest prompt; lengths of mixed ones
SHORT = 16  # tokens of the shorter answer: no fewer than steps in which the prompts of the largest batch are computed
PROMPTS = {  # lengths -> columns of the rows
    "equal": {"case": "decode step", "prompt_tokens": f"{PROMPT}"},
    "mixed": {"case": "decode step, mixed lengths", "prompt_tokens": f"{PROMPT}-{PROMPT + SPREAD - 1}"},
}
NGRAMS = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROFILED = 16  # tokens by which the longer of two profiles is longer
STEP_TOKENS = 2048  # the most of a step: activations stay small
OFFLINE_PROMPT = 256  # tokens of the shortest prompt of whole runs
OFFLINE_STEP_TOKENS = 8192  # the most of their steps
CACHED = {  # variants with prefix caching -> the same without
    "vllm_operators_align": "vllm_operators",
    "vllm_operators_slots": "vllm_operators",
    "fused_slots": "fused",
    "fused_int8_slots": "fused_int8",
}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="9b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=256, help="tokens by which the longer answer is longer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", nargs="+", choices=[*PROMPTS], default=["equal"], help="their lengths")
    parser.add_argument("--drafts", type=int, default=0, help="tokens drafted by n-grams in each step")
    parser.add_argument("--offline", type=int, default=0, help="requests of whole runs, as a multiple of the batch")
    parser.add_argument("--profile", type=pathlib.Path, help="folder: profile, by batch: traces, and rows of kernels")
    add_engine_arguments(parser, variants=["vllm_operators", "fused"])
    add_arguments(parser)
    args = parser.parse_args(argv)
    if min(*args.batches, args.steps, args.repeats) < 1:
        parser.error("--batches, --steps and --repeats must be positive")
    if min(args.offline, args.drafts) < 0:
        parser.error("--offline and --drafts must not be negative")
    return args


def options_of(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """`vllm.LLM`'s arguments for one variant: as a user would have them, but for graphs of these batches only."""
    widest = max(args.batches)
    prompt, step = (OFFLINE_PROMPT, OFFLINE_STEP_TOKENS) if args.offline else (PROMPT, STEP_TOKENS)
    more: dict[str, Any] = {"max_num_batched_tokens": max(step, widest * (1 + args.drafts))}
    if args.drafts:
        more["speculative_config"] = NGRAMS | {"num_speculative_tokens": args.drafts}
    if not args.eager:
        sizes = [batch * (1 + args.drafts) for batch in sorted(args.batches)]
        more["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if args.profile:
        more |= profiler_options(args.profile / name)
    longest = prompt + SPREAD - 1 + SHORT + args.steps
    return engine_options(args, name, model, bamba_config(args.shape), widest, longest, **more)


def lengths(kind: str, requests: int, shortest: int = PROMPT) -> list[int]:
    """Tokens of so many prompts."""
    return [shortest + (i % SPREAD if kind == "mixed" else 0) for i in range(requests)]


def step_bytes(
    at_least: Bytes, config: PreTrainedConfig, dtype: torch.dtype, name: str, batch: int, context: int
) -> float:
    """What a step of this variant must move, on average: the fused step reads all of a state and writes little."""
    given = VARIANTS[name]["additional_config"]
    if not given["bamba_fused_step"]:
        return at_least.decode_step(batch, context)
    form = fused_format(config, dtype, dtype, given, anchored=False)
    size = {key: torch.Size(of_slot).numel() * of.itemsize for key, (of_slot, of) in form.tensors().items()}
    ring = sum(size.pop(key) for key in ("ring_x", "ring_b", "ring_dt") if key in size)
    conv, written = size.pop("conv"), 1 / max(form.replay, 1)  # the share of a state, and of its ring, that is written
    state = conv * (1 + 1 / form.width) + sum(size.values()) * (1 + written) + ring * (0.5 + written)
    mixers = config.num_hidden_layers - len(config.attn_layer_indices)
    return at_least.weights + batch * (mixers * state + context * at_least.kv_per_token)


@dataclass(frozen=True)
class Case:
    """One batch: what its rows have in common.

    Attributes:
        drafts: of each sequence in a step.
        moved: bytes of a step, by variant.
        limits: of the device.
    """

    kind: str
    batch: int
    drafts: int
    moved: Mapping[str, float]
    limits: Limits

    @property
    def drafted(self) -> str:
        """For the name of the case."""
        return f", {self.drafts} drafts by n-grams, a token" if self.drafts else ""

    def columns(self, variant: Variant, milliseconds: float) -> dict[str, Any]:
        """Of a result row of a step that takes so long."""
        moved, columns = self.moved[variant.name], variant.columns | PROMPTS[self.kind]
        columns["case"] += self.drafted
        details = f"{columns['details']}; {moved:.0f} bytes"
        if milliseconds > 0 and not self.drafts:
            share = self.limits.floor_ms(moved) / milliseconds
            details += f", {moved / milliseconds / 1e6:.0f} GB/s, {share:.0%} of a copy's"
        return columns | {"batch": self.batch, "verified": "n/a: random weights", "details": details}


def measure(
    args: argparse.Namespace, variants: list[Variant], batch: int, prompts: Iterator[list[list[int]]]
) -> dict[str, Samples]:
    """Milliseconds of a step, by variant; `prompts` are new ones each time."""
    order, steps = random.Random(args.seed), {variant.name: list[float]() for variant in variants}
    warm_up = next(prompts)
    for variant in variants:  # the first run of a batch may compile what the start did not
        variant.generate(warm_up, SHORT)
    for repeat in range(args.repeats):
        progress(f"batch {batch}: round {repeat + 1} of {args.repeats}")
        for_short, for_long = next(prompts), next(prompts)
        for variant in order.sample(variants, len(variants)):
            short = variant.generate(for_short, SHORT).seconds
            long = variant.generate(for_long, SHORT + args.steps).seconds
            steps[variant.name].append((long - short) / args.steps * 1e3)
    return {name: Samples(tuple(values)) for name, values in steps.items()}


def report(results: Results, variants: list[Variant], case: Case, steps: dict[str, Samples]) -> None:
    """Write and print what was measured of one batch: steps, and how they compare."""
    for variant in variants:
        sample = steps[variant.name]
        columns = case.columns(variant, sample.median)
        results.add_samples(sample, metric="decode_step", unit="ms", **columns)
        print(f"  {variant.name} {sample.median:.2f} ({sample.low:.2f} to {sample.high:.2f})", end="")
        for other in dict.fromkeys(("vllm_operators", CACHED.get(variant.name, "vllm_operators"))):
            if other == variant.name or other not in steps:
                continue
            base = steps[other]
            if min(base.low, sample.low) <= 0:
                print(f" (too noisy to be compared with {other})", end="")
                continue
            ratio = base.median / sample.median
            low, high = base.low / sample.high, base.high / sample.low
            results.add(
                metric=f"speed_up_over_{other}", unit="ratio", value=ratio, low=low, high=high, repeats=sample.count,
                **columns,
            )  # fmt: skip
            print(f" {ratio:.3f}x {other}", end="")
    print(flush=True)


def compare_offline(
    args: argparse.Namespace,
    results: Results,
    variants: list[Variant],
    case: Case,
    vocabulary: int,
    seeds: Iterator[int],
) -> None:
    """Time whole runs, all variants in turn; write and print generated tokens a second."""
    order, speeds = random.Random(args.seed), {variant.name: list[float]() for variant in variants}
    prompts = lengths(case.kind, case.batch * args.offline, OFFLINE_PROMPT)
    for repeat in range(1 + args.repeats):  # the first may compile what the start did not
        progress(f"{len(prompts)} requests: round {repeat} of {args.repeats}")
        given = random_prompts(prompts, vocabulary, next(seeds))
        for variant in order.sample(variants, len(variants)):
            seconds = variant.generate(given, SHORT + args.steps).seconds
            speeds[variant.name].append(len(prompts) * (SHORT + args.steps) / seconds)
    lengths_said = "-".join(map(str, sorted({min(prompts), max(prompts)})))
    print(f"batch {case.batch}, {len(prompts)} requests of {lengths_said} tokens at once:", end="")
    for variant in variants:
        sample = Samples(tuple(speeds[variant.name][1:]))
        columns = case.columns(variant, 0) | {"prompt_tokens": lengths_said, "case": f"offline{case.drafted}"}
        results.add_samples(sample, metric="throughput", unit="tokens/s", **columns)
        print(f"  {variant.name} {sample.median:.0f} tokens/s ({sample.low:.0f} to {sample.high:.0f})", end="")
    print(flush=True)


def report_kernels(
    args: argparse.Namespace, results: Results, variant: Variant, case: Case, prompts: Iterator[list[list[int]]]
) -> None:
    """Profile, and write what a step's kernels take on the GPU: the host, busy or not, has no part in it."""
    taken = []
    for tokens in (SHORT, SHORT + PROFILED):
        variant.generate(next(prompts), tokens, profile=True)
        taken.append(kernel_milliseconds(args.profile / variant.name))
    if not taken[0]:
        progress(f"{variant.name}: no kernels in its profile, so no row of them")
        return
    step = (taken[1] - taken[0]) / PROFILED
    results.add(metric="decode_step_kernels", unit="ms", value=step, repeats=1, **case.columns(variant, step))
    print(f"  {variant.name}: kernels {step:.3f} ms", flush=True)


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype, config = dtype_of(args.dtype), bamba_config(args.shape)
    results = Results.of(
        "bench_decode",
        args,
        list(argv),
        model=f"bamba-{args.shape}",
        weights="random",
        dtype=dtype_name(dtype),
        output_tokens=SHORT + args.steps,
    )
    progress("measuring what this device reaches")
    limits = measure_limits(dtype, seed=args.seed)
    torch.cuda.empty_cache()
    at_least, seeds = bytes_moved(config, dtype, dtype), itertools.count(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_model(pathlib.Path(folder), "bamba", args.shape)
        with running({name: options_of(args, name, folder) for name in args.variants}) as variants:
            for batch, kind in itertools.product(args.batches, args.prompts):
                tokens = lengths(kind, batch)
                prompts = (random_prompts(tokens, config.vocab_size, seed) for seed in seeds)
                steps = measure(args, variants, batch, prompts)
                context = sum(tokens) // batch + args.steps // 2
                moved = {name: step_bytes(at_least, config, dtype, name, batch, context) for name in args.variants}
                floor = limits.floor_ms(at_least.decode_step(batch, context))
                case = Case(kind, batch, args.drafts, moved, limits)
                reached = f"{limits.bytes_per_second / 1e9:.0f} GB/s, measured in this run"
                if not args.drafts:  # else a token has no step of its own
                    results.add(
                        variant="floor", batch=batch, metric="decode_step", unit="ms", value=floor, repeats=1,
                        verified="n/a", state_dtype=dtype_name(dtype), cache_mode="none",
                        details=f"{reached}; state read and written every step", **PROMPTS[kind],
                    )  # fmt: skip
                print(f"batch {batch}, prompts {kind}: floor {floor:.2f} ms", end="")
                report(results, variants, case, steps)
                if args.offline:
                    compare_offline(args, results, variants, case, config.vocab_size, seeds)
                for variant in variants if args.profile else ():
                    report_kernels(args, results, variant, case, prompts)
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
