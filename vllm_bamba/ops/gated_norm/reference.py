"""The gated norm in the precision of its inputs, all channels at once."""

import torch
import torch.nn.functional as F

from vllm_bamba.ops.gated_norm import Division


def gated_rms_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x and gate [tokens, channels], weight [channels]; returns [tokens, channels]."""
    gated = x * F.silu(gate)
    return weight * gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()


def divide_reference(y: torch.Tensor, division: Division | None) -> torch.Tensor:
    """y [tokens, any], each token divided where that is left to do."""
    if division is None:
        return y
    return y / (division.sums.to(y.dtype).sum(-1, keepdim=True) / division.channels + division.eps).sqrt()
