"""Linear maps, and what stands around them, in the precision of their inputs."""

import torch
import torch.nn.functional as F

from vllm_bamba.ops.gated_norm import Division
from vllm_bamba.ops.gated_norm.reference import divide_reference


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, K], weight [N, K]; returns [rows, N]."""
    return x @ weight.t()


def divided_linear_reference(
    x: torch.Tensor, division: Division | None, weight: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """x [rows, K], weight [N, K], or gated [2N, K]; returns [rows, N]."""
    y = divide_reference(skinny_linear_reference(x, weight), division)
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y
