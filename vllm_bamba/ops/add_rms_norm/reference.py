"""RMSNorm of a sum in the precision of its inputs."""

import torch

from vllm_bamba.ops.gated_norm import Division
from vllm_bamba.ops.gated_norm.reference import divide_reference


def add_rms_norm_reference(
    y: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, division: Division | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and residual [tokens, channels], weight [channels]; returns two of y's shape."""
    total = divide_reference(y, division) + residual
    return total, weight * total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
