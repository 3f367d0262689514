"""Find the warps of the fused decode step's programs that serve fastest, for the table of its `tuning.py`.

    python benchmarks/tune_mixer_step.py

Every candidate is checked against the fp64 reference, then takes turns with the others and with vLLM's two operators on
cold caches. Prints which is best for this GPU, 16-bit states and int8, and writes all times as rows.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import sys
from collections.abc import Mapping, Sequence

import torch
from bench_ops import CHECKED_ROWS, wrong_ones
from op_cases import VLLM, fused_step
from op_inputs import Problem
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from timing import interleaved, measure_limits

CANDIDATES = {f"{warps} warps": warps for warps in (1, 2, 4, 8)}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["9b", "tiny"], default="9b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="auto", help="of activations and 16-bit states; auto: bfloat16 on a GPU")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    add_arguments(parser)
    return parser.parse_args(argv)


def compile_one(problem: Problem, int8: bool, name: str, warps: int) -> None:
    """In a process of its own; the next process finds the kernel on the disk."""
    fused_step(problem, int8, {name: warps}).calls[name]()


def best(times: Sequence[Mapping[str, float]]) -> str:
    """The candidate whose times, each as a share of the batch's fastest, have the smallest mean."""
    return min(times[0], key=lambda name: sum(batch[name] / min(batch.values()) for batch in times))


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype = dtype_of(args.dtype)
    limits = measure_limits(dtype, seed=args.seed)
    small = Problem.of(args.shape, CHECKED_ROWS, dtype, dtype, args.seed)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        progress(f"compiling {2 * len(CANDIDATES)} kernels")
        jobs = [pool.submit(compile_one, small, int8, *item) for int8 in (False, True) for item in CANDIDATES.items()]
        for job in jobs:
            job.result()
    for int8 in (False, True):
        results = Results.of(
            "tune_mixer_step",
            args,
            list(argv),
            model=f"bamba-{args.shape}",
            weights="random inputs",
            case="mixer_step_int8" if int8 else "mixer_step",
            dtype=dtype_name(dtype),
            state_dtype="int8" if int8 else dtype_name(dtype),
            cache_mode="none",
        )
        wrong = wrong_ones(functools.partial(fused_step, int8=int8, warps=CANDIDATES), small)
        for name in wrong.keys() & CANDIDATES.keys():
            progress(f"left out: {name} {wrong[name]}")
        right = {name: warps for name, warps in CANDIDATES.items() if name not in wrong}
        every = []
        for batch in args.batches:
            problem = Problem.of(args.shape, batch, dtype, dtype, args.seed)
            case = fused_step(problem, int8, right)
            times, moved = interleaved(case.calls, args.repeats, problem.seed), case.bytes_moved
            del case  # before the next one needs the memory
            torch.cuda.empty_cache()
            for name, samples in times.items():
                details = f"{moved} bytes; cold cache; floor {limits.floor_ms(moved):.4f} ms if states are read only"
                results.add_samples(
                    samples, variant=name, batch=batch, metric="time", unit="ms", details=details,
                    verified="agrees with the reference",
                )  # fmt: skip
            ours = {name: samples.median for name, samples in times.items() if name != VLLM}
            fastest = min(ours, key=ours.__getitem__)
            every.append(ours)
            ranked = sorted(ours.items(), key=lambda item: item[1])
            print(
                f"\nbatch {batch}, {'int8' if int8 else dtype_name(dtype)}: vllm {times[VLLM].median:.4f} ms, ", end=""
            )
            print(f"ours {ours[fastest]:.4f}, {times[VLLM].median / ours[fastest]:.2f}x, ", end="")
            print(f"{moved / ours[fastest] / 1e6:.0f} of {limits.bytes_per_second / 1e9:.0f} GB/s")
            for name, milliseconds in [*ranked[:6], *ranked[-1:]]:
                print(f"  {milliseconds:.4f} {name}")
        print(f"\nfor tuning.py, {'int8' if int8 else '16-bit'} states: {best(every)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
