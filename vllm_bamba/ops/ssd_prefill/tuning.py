"""Launches of vLLM's scan kernels that are known to be fast, so that no start has to try them all out.

From `benchmarks/tune_ssd_prefill.py`, for activations in bf16; what is not in the table is left to Triton's autotuner.
"""

from collections.abc import Mapping

# (compute capability, (head_dim, state, chunk size)) -> kernel -> tile sizes, num_warps, num_stages
TUNED: dict[tuple[tuple[int, int], tuple[int, int, int]], Mapping[str, Mapping[str, int]]] = {}
