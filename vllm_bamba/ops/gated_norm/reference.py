"""The gated norm in the precision of its inputs, all channels at once."""

import torch
import torch.nn.functional as F


def gated_rms_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x and gate [tokens, channels], weight [channels]; returns [tokens, channels]."""
    gated = x * F.silu(gate)
    return weight * gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()
