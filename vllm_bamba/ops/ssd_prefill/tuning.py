"""Launches of vLLM's scan kernels that are known to be fast, so that no start has to try them all out.

From `benchmarks/tune_ssd_prefill.py` (rows in `benchmarks/results`), for activations in bf16. GPUs that are not in the
table are left to Triton's autotuner.
"""

from collections.abc import Mapping

# (compute capability, (head_dim, state, chunk size)) -> kernel -> tile sizes, num_warps, num_stages
TUNED: dict[tuple[tuple[int, int], tuple[int, int, int]], Mapping[str, Mapping[str, int]]] = {
    ((9, 0), (64, 128, 256)): {  # an H100; at most 6 % slower than the fastest at 512, 2,048 and 8,192 tokens
        "_bmm_chunk_fwd_kernel": {
            "BLOCK_SIZE_M": 32,
            "BLOCK_SIZE_N": 64,
            "BLOCK_SIZE_K": 32,
            "num_warps": 2,
            "num_stages": 5,
        },
        "_chunk_scan_fwd_kernel": {
            "BLOCK_SIZE_M": 64,
            "BLOCK_SIZE_N": 64,
            "BLOCK_SIZE_K": 32,
            "num_warps": 4,
            "num_stages": 1,
        },
        "_chunk_cumsum_fwd_kernel": {"BLOCK_SIZE_H": 4, "num_warps": 4, "num_stages": 3},
        "_chunk_state_fwd_kernel": {
            "BLOCK_SIZE_M": 64,
            "BLOCK_SIZE_N": 128,
            "BLOCK_SIZE_K": 32,
            "num_warps": 4,
            "num_stages": 4,
        },
        "_state_passing_fwd_kernel": {"BLOCK_SIZE": 1024, "num_warps": 4, "num_stages": 3},
    },
}


def launches_for(capability: tuple[int, int], sizes: tuple[int, int, int]) -> Mapping[str, Mapping[str, int]]:
    """What is tuned for these sizes, or else first for others on such a GPU: any launch is right for any size."""
    tables = {tuned: launches for (of, tuned), launches in TUNED.items() if of == capability}
    return tables.get(sizes) or next(iter(tables.values()), {})
