"""The recurrence over packed prefills without a GPU: vLLM's C++ kernel.

On a CPU vLLM gives it the Triton kernels' name and arguments; but it wants x, B and C contiguous.
"""

from typing import Any

import torch

from vllm_bamba.ops.ssd_prefill import kernels


def scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """As `kernels.scan`."""
    return kernels.scan(x.contiguous(), dt, A, B.contiguous(), C.contiguous(), *rest)
