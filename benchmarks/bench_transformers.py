"""This plugin's engine against Transformers' `generate`, on the same weights.

    python benchmarks/bench_transformers.py --shape 9b --kernels on off      # one GPU: makes 20 GB of random weights
    python benchmarks/bench_transformers.py --model examples/bamba-tiny --batches 1 4 --prompts 32 --mixed 12

Two workloads: fixed batches of equal prompts, and the batch that a user has: prompts of mixed lengths, which
Transformers must be given as static batches, sorted by length and padded, and `LLM.generate` all at once. Every request
generates the same number of tokens, greedily, whatever it says.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from engines import Engine, Tokens, Transformers, Vllm
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from shapes import Bytes, bytes_moved, mixed_lengths, random_prompts, write_random_weights
from timing import Limits, Samples, measure_limits, wall_clock
from transformers import AutoConfig

PADDING_CHECKS = 8  # prompts of the mixed batch that Transformers answers once more, unpadded


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=pathlib.Path, help="folder of a Bamba checkpoint")
    source.add_argument("--shape", choices=["9b", "tiny"], default="9b", help="random weights of this shape")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 256])
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024, 8192], help="prompt lengths")
    parser.add_argument("--output", type=int, default=128, help="tokens that every request generates")
    parser.add_argument("--mixed", type=int, default=1000, help="prompts of the mixed batch; 0 leaves it out")
    parser.add_argument("--mixed-lengths", nargs=2, type=int, default=[32, 2048], metavar=("LOW", "HIGH"))
    parser.add_argument("--static-batch", type=int, default=64, help="prompts of one static batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 without")
    parser.add_argument("--state-dtype", default="auto", help="of this plugin's SSM state; auto: vLLM's default")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile and CUDA graphs")
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=["auto", "on", "off"],
        default=["auto"],
        help="mamba-ssm and causal-conv1d in Transformers: what is found, demanded, left out; several run in turn",
    )
    parser.add_argument("--attention", default="auto", help="Transformers' attention; auto: flash_attention_2 or sdpa")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if min(*args.batches, *args.prompts, args.static_batch, args.repeats, *args.mixed_lengths) < 1:
        parser.error("batches, prompts, lengths and repeats must be positive")
    if args.output < 2:
        parser.error("--output must be at least 2: the time of a decode step is taken from the tokens after the first")
    if args.mixed_lengths[0] >= args.mixed_lengths[1]:
        parser.error("--mixed-lengths: LOW must be below HIGH")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in that folder")
    return args


def static_batches(engine: Engine, prompts: Tokens, output: int, size: int) -> Tokens:
    """What a user of static batches does: sort by length, cut into batches, pad each, restore the order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: Tokens = [[] for _ in prompts]
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        progress(f"static batch {start // size + 1} of {-(-len(order) // size)}")
        for row, answer in zip(rows, engine.generate([prompts[i] for i in rows], output), strict=True):
            answers[row] = answer
    return answers


@dataclass(frozen=True)
class Workload:
    """Prompts that are answered together; `length` is theirs, or None where it varies."""

    name: str
    prompts: Tokens
    length: int | None


def workloads(args: argparse.Namespace, vocab_size: int) -> list[Workload]:
    equal = [
        Workload(f"{batch} x {length}", random_prompts([length] * batch, vocab_size, args.seed), length)
        for length in args.prompts
        for batch in args.batches
    ]
    if not args.mixed:
        return equal
    low, high = args.mixed_lengths
    lengths = mixed_lengths(args.mixed, low, high, args.seed)
    return [*equal, Workload(f"mixed {args.mixed}", random_prompts(lengths, vocab_size, args.seed), None)]


@dataclass
class Comparison:
    """One run: what each engine answered and how fast, and the rows that say so."""

    args: argparse.Namespace
    results: Results
    limits: Limits
    moved: Callable[[str], Bytes]  # of a state dtype
    answers: dict[str, Tokens] = field(default_factory=dict)  # workload -> of the engine that went first
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)  # workload -> engine -> tokens a second

    def run(self, engine: Engine, work: Workload) -> None:
        args = self.args
        progress(f"{engine.name}: {work.name}")
        columns: dict[str, Any] = {
            "variant": engine.name,
            "case": "mixed lengths" if work.length is None else "equal lengths",
            "batch": len(work.prompts),
            "prompt_tokens": work.length or f"{args.mixed_lengths[0]} to {args.mixed_lengths[1]}",
            "output_tokens": args.output,
            "details": engine.details,
            "state_dtype": engine.state_dtype,
        }
        generate = self._all_at_once(engine, work)
        try:
            answers = generate(args.output)  # the warm-up too
            total = wall_clock(lambda: generate(args.output), args.repeats, warm_up=0)
            first = wall_clock(lambda: generate(1), args.repeats) if work.length else None
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.results.add(metric="out_of_memory", value=1, unit="flag", repeats=1, verified="n/a", **columns)
            print(f"{work.name:>14}  {engine.name:20} out of memory")
            return
        columns["verified"] = self._compare(work, answers)
        tokens = len(work.prompts) * args.output
        speed = total.map(lambda seconds: tokens / seconds)
        self.results.add_samples(total, metric="latency", unit="s", **columns)
        self.results.add_samples(speed, metric="output_throughput", unit="tokens/s", **columns)
        print(f"{work.name:>14}  {engine.name:20} {total.median:8.3f} s  {speed.median:9.1f} tokens/s", end="")
        if first is not None:
            self._add_phases(engine, columns, work, total, first)
        for other, speed_of_other in self.speeds.get(work.name, {}).items():
            ratio = speed.median / speed_of_other
            self.results.add(
                metric=f"speed_up_over_{other}", value=ratio, unit="ratio", repeats=args.repeats, **columns
            )
            print(f"  {ratio:.2f}x {other}", end="")
        print(f"  ({columns['verified']})")
        self.speeds.setdefault(work.name, {})[engine.name] = speed.median
        if work.length is None and isinstance(engine, Transformers):
            self._add_padding_check(engine, columns, work, answers)

    def _all_at_once(self, engine: Engine, work: Workload) -> Callable[[int], Tokens]:
        if work.length is None and isinstance(engine, Transformers):
            return lambda output: static_batches(engine, work.prompts, output, self.args.static_batch)
        return lambda output: engine.generate(work.prompts, output)

    def _compare(self, work: Workload, answers: Tokens) -> str:
        expected = self.answers.setdefault(work.name, answers)
        if expected is answers:
            return "the answers that others are compared with"
        same = sum(a == b for a, b in zip(answers, expected, strict=True))
        if self.args.model is None and same < len(answers):
            return "n/a: random weights"  # rounding decides between tokens that are about as likely
        return f"same tokens in {same} of {len(answers)} requests"

    def _add_phases(
        self, engine: Engine, columns: dict[str, Any], work: Workload, total: Samples, first: Samples
    ) -> None:
        """Prefill, one decode step, and the least time that the bytes of such a step take."""
        batch, length, output = len(work.prompts), work.length or 0, self.args.output
        prefill = first.map(lambda seconds: batch * length / seconds)
        self.results.add_samples(prefill, metric="prefill_throughput", unit="tokens/s", **columns)
        step = total.map(lambda seconds: (seconds - first.median) / (output - 1) * 1e3)
        self.results.add_samples(step, metric="decode_step", unit="ms", **columns)
        decode = {"metric": "decode_throughput", "unit": "tokens/s"}
        if step.low > 0:  # else the run is too short to tell the phases apart
            self.results.add_samples(step.map(lambda ms: batch / ms * 1e3), **decode, **columns)
        moved = self.moved(engine.state_dtype).decode_step(batch, length + output // 2)
        floor = self.limits.floor_ms(moved)
        print(f"  step {step.median:.2f} ms, limit {floor:.2f}", end="")
        if isinstance(engine, Transformers):
            return
        reached = f"{moved} bytes at {self.limits.bytes_per_second / 1e9:.1f} GB/s, measured in this run"
        roofline = columns | {"variant": "roofline", "details": reached, "verified": "n/a", "repeats": 1}
        self.results.add(value=batch / floor * 1e3, **decode, **roofline)

    def _add_padding_check(self, engine: Engine, columns: dict[str, Any], work: Workload, answers: Tokens) -> None:
        """Count the prompts that Transformers answers differently when they are not padded."""
        count = min(PADDING_CHECKS, len(work.prompts))
        alone = [engine.generate([prompt], self.args.output)[0] for prompt in work.prompts[:count]]
        changed = sum(a != b for a, b in zip(alone, answers, strict=False))
        row = columns | {"verified": f"{count} prompts compared with unpadded ones"}
        self.results.add(metric="answers_changed_by_padding", value=changed, unit="requests", repeats=1, **row)
        print(f"{'':14}  padding and batching changed {changed} of {count} of Transformers' answers")


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype = dtype_of(args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            progress(f"writing random weights of shape {args.shape}")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            write_random_weights(pathlib.Path(folder), args.shape, args.seed, dtype, device)
        compare(args, list(argv), str(args.model or folder), dtype)


def compare(args: argparse.Namespace, argv: list[str], model: str, dtype: torch.dtype) -> None:
    """Transformers first, then this plugin: both would not fit into a GPU at once."""
    config = AutoConfig.from_pretrained(model)
    results = Results.of(
        "bench_transformers",
        args,
        argv,
        model=args.model.name if args.model else f"bamba-{args.shape}",
        weights="checkpoint" if args.model else "random",
        dtype=dtype_name(dtype),
        cache_mode="none",
    )
    progress("measuring what this device reaches")
    limits = measure_limits(dtype, seed=args.seed)
    longest = max([*args.prompts, args.mixed_lengths[1] if args.mixed else 1]) + args.output
    widest = max([*args.batches, args.static_batch])
    makers: list[Callable[[], Engine]] = [
        *(lambda k=k: Transformers(model, dtype, k, args.attention) for k in args.kernels),
        lambda: Vllm(model, dtype, args.state_dtype, longest, widest, args.eager),
    ]

    @functools.cache
    def moved(state_dtype: str) -> Bytes:
        return bytes_moved(config, dtype, dtype if state_dtype == "unknown" else dtype_of(state_dtype))

    comparison = Comparison(args, results, limits, moved)
    for make in makers:
        engine = make()
        for work in workloads(args, config.vocab_size):
            comparison.run(engine, work)
        engine.close()
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
