"""Find the launches with which a linear map of few rows is fastest, for the table of `ops/skinny_linear/tuning.py`.

    python benchmarks/tune_skinny_linear.py

Every candidate takes turns with the others and with PyTorch's product (cuBLAS) on cold caches.
Prints the fastest of each number of rows and writes all times as rows.
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from rows import Results, add_arguments, dtype_name, progress
from shapes import bamba_config
from timing import Samples, interleaved, measure_limits
from triton.runtime.errors import OutOfResources

from vllm_bamba.config import BambaShape
from vllm_bamba.ops.skinny_linear import skinny_linear
from vllm_bamba.ops.skinny_linear.tuning import MANY, Launch
from vllm_bamba.state import mixer_shard

PYTORCH = "pytorch"
DTYPE = torch.bfloat16
SHARED_MEMORY = 222 << 10  # bytes of an SM that a program may take
IN_FLIGHT = 40 << 10  # bytes that it should ask for at once: less does not keep the memory busy
MOST_DESCRIBED = 256  # numbers on a side of what a descriptor describes
CLOSE = 0.05  # largest difference from PyTorch's product, of values about 1


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["9b", "tiny"], default="9b")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32, 64])
    parser.add_argument("--only", nargs="+", choices=[*projections("9b")], help="some of the projections")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    add_arguments(parser)
    return parser.parse_args(argv)


def projections(shape: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of the weights of a model."""
    sizes = BambaShape.from_hf(bamba_config(shape))
    hidden, queries = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    return {
        "in_proj": (sum(mixer_shard(sizes, 1).in_proj_sizes), hidden),
        "out_proj": (hidden, sizes.mamba_intermediate),
        "gate_up_proj": (2 * sizes.intermediate_size, hidden),
        "down_proj": (hidden, sizes.intermediate_size),
        "qkv_proj": (queries + 2 * sizes.num_key_value_heads * sizes.head_dim, hidden),
        "o_proj": (hidden, queries),
        "lm_head": (sizes.vocab_size, hidden),
    }


def candidates(rows: int) -> Iterator[Launch]:
    """Launches that serve so many rows, with a reasonable use of shared memory and registers."""
    most = max(8, 1 << (rows - 1).bit_length())  # tensor cores take no fewer
    for columns, depth, stages, warps, described in itertools.product(
        (16, 32, 64, 128), (128, 256, 512), (2, 3, 4, 5, 6, 9), (2, 4, 8), (False, True)
    ):
        if described and (columns == 16 or depth > MOST_DESCRIBED):
            continue
        in_flight = stages * depth * 2 * (columns + most)
        registers = columns * most // (32 * warps)  # of a thread, for the sums
        if IN_FLIGHT <= in_flight <= SHARED_MEMORY and registers <= 64 and (columns > 32 or warps < 8):
            yield Launch(most, columns, depth, stages, warps, described)


def compile_one(launch: Launch) -> bool:
    """In a process of its own; the next process finds the kernel on the disk. False if an SM has no room for it."""
    x = torch.zeros(launch.rows, launch.depth, dtype=DTYPE, device="cuda")
    try:
        skinny_linear(x, torch.zeros(128, launch.depth, dtype=DTYPE, device="cuda"), [launch])
    except OutOfResources:
        return False
    return True


def times_of(
    columns: int, depth: int, launches: Sequence[Launch], rows: int, repeats: int, seed: int
) -> dict[str, Samples]:
    """Milliseconds by launch and of PyTorch; launches that are wrong are left out."""
    torch.manual_seed(seed)
    x = torch.randn(rows, depth, device="cuda").to(DTYPE)
    weight = (torch.randn(columns, depth, device="cuda") / math.sqrt(depth)).to(DTYPE)
    expected, calls = F.linear(x, weight), {PYTORCH: functools.partial(F.linear, x, weight)}
    for launch in launches:
        if depth % launch.depth:  # it would be PyTorch's product
            continue
        if not (skinny_linear(x, weight, [launch]) - expected).abs().max() <= CLOSE:  # NaN is wrong too
            progress(f"left out, since its product is wrong: {launch}")
            continue
        calls[str(launch)] = functools.partial(skinny_linear, x, weight, [launch])
    return interleaved(calls, repeats, seed)


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    limits = measure_limits(DTYPE, seed=args.seed)
    results = Results.of(
        "tune_skinny_linear",
        args,
        list(argv),
        model=f"bamba-{args.shape}",
        weights="random inputs",
        dtype=dtype_name(DTYPE),
        state_dtype="n/a",
        cache_mode="none",
    )
    every = dict.fromkeys(itertools.chain(*map(candidates, args.rows)))
    progress(f"compiling {len(every)} kernels")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        usable = {launch for launch, fits in zip(every, pool.map(compile_one, every, chunksize=4), strict=True) if fits}
    for name, (columns, depth) in projections(args.shape).items():
        if args.only and name not in args.only:
            continue
        for rows in args.rows:
            launches = [launch for launch in candidates(rows) if launch in usable]
            times = times_of(columns, depth, launches, rows, args.repeats, args.seed)
            moved = 2 * (columns * depth + rows * (columns + depth))
            for variant, samples in times.items():
                results.add_samples(
                    samples, case=name, variant=variant, batch=rows, metric="time", unit="ms",
                    details=f"{moved} bytes; cold cache; floor {limits.floor_ms(moved):.4f} ms",
                    verified="agrees with PyTorch's product",
                )  # fmt: skip
            ranked = sorted(times.items(), key=lambda item: item[1].median)
            kind = "many" if columns > MANY else "few"
            print(f"\n{name} ({kind} columns), {rows} rows: floor {limits.floor_ms(moved):.4f} ms, ", end="")
            print(f"{PYTORCH} {times[PYTORCH].median:.4f} ms")
            for variant, samples in ranked[:4]:
                print(f"  {samples.median:.4f} {variant}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
