"""Find the launches with which vLLM's scan kernels serve prompts fastest, for the table of `ops/ssd_prefill/tuning.py`.

    python benchmarks/tune_ssd_prefill.py

Triton's autotuner tries all launches of each kernel, as vLLM would have it do when an engine starts, but for prompts of
several lengths. Prints a table entry for this GPU and writes all times as rows.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from bench_ops import CHECKED_TOKENS, wrong_ones
from op_cases import OURS, prefill
from op_inputs import Problem
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from timing import Samples

from vllm_bamba.compat import autotuned_kernels, fix_launches, forget_autotuning
from vllm_bamba.ops.ssd_prefill.kernels import MODULES

Launch = tuple[tuple[str, int], ...]  # tile sizes, num_warps, num_stages


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["9b", "tiny"], default="9b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192], help="of one prompt")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU")
    add_arguments(parser)
    return parser.parse_args(argv)


def tried(problem: Problem) -> dict[str, dict[Launch, float]]:
    """Kernel -> launch -> milliseconds, of one prompt."""
    kernels = autotuned_kernels(*MODULES)
    forget_autotuning(*MODULES)
    prefill(problem).calls[OURS]()
    return {
        name: {
            (*config.kwargs.items(), ("num_warps", config.num_warps), ("num_stages", config.num_stages)): times[0]
            for config, times in kernel.configs_timings.items()
        }
        for name, kernel in kernels.items()
        if getattr(kernel, "configs_timings", None)
    }


def best(times: Sequence[dict[Launch, float]]) -> Launch:
    """The launch that loses least against the fastest, over all lengths."""
    return min(times[0], key=lambda launch: math.prod(t[launch] / min(t.values()) for t in times))


def trusted(launches: dict[str, dict[str, int]], small: Problem) -> str:
    """What is wrong with these launches on a small problem, empty if nothing is: an error, or results that vary."""
    forget_autotuning(*MODULES)
    fix_launches(launches, *MODULES)
    wrong, call = wrong_ones(prefill, small), prefill(small).calls[OURS]
    if OURS in wrong:
        return f"{OURS} {wrong[OURS]}"
    return "" if torch.equal(call().clone(), call()) else f"{OURS} gives other bits the second time"


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype = dtype_of(args.dtype)
    results = Results.of(
        "tune_ssd_prefill",
        args,
        list(argv),
        model=f"bamba-{args.shape}",
        weights="random inputs",
        case="ssd_prefill",
        dtype=dtype_name(dtype),
        state_dtype=dtype_name(dtype),
        cache_mode="none",
    )
    by_length = {}
    for tokens in args.tokens:
        progress(f"a prompt of {tokens} tokens")
        by_length[tokens] = tried(Problem.of(args.shape, tokens, dtype, dtype, args.seed))
        for kernel, launches in by_length[tokens].items():
            for launch, milliseconds in launches.items():
                if math.isfinite(milliseconds):
                    results.add_samples(
                        Samples((milliseconds,)), variant=kernel, prompt_tokens=tokens, metric="time", unit="ms",
                        details=str(dict(launch)), verified="n/a: only timed",
                    )  # fmt: skip
    chosen, losses = {}, {}
    for kernel in by_length[args.tokens[0]]:
        launch = best([by_length[tokens][kernel] for tokens in args.tokens])
        losses[kernel] = max(t[kernel][launch] / min(t[kernel].values()) for t in by_length.values()) - 1
        chosen[kernel] = dict(launch)
    if problem := trusted(chosen, Problem.of(args.shape, CHECKED_TOKENS, dtype, dtype, args.seed)):
        raise SystemExit(f"the fastest launches are not to be used: {problem}\n{chosen}")
    shape = Problem.of(args.shape, 1, dtype, dtype, args.seed).shape
    sizes = (shape.mamba_head_dim, shape.mamba_state, shape.chunk_size)
    print(f"for tuning.py:\n({torch.cuda.get_device_capability()}, {sizes}): {{")
    for kernel, options in chosen.items():
        print(f'    "{kernel}": {options},  # at most {losses[kernel]:.0%} slower than the fastest')
    print("},", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
