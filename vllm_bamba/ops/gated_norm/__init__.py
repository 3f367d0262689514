"""RMSNorm of the gated mixer output (equation in ../README.md).

Plain torch: inside vLLM's compiled graph Inductor makes one kernel of it and of its neighbours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    channels: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Normalise x * silu(gate) over all `channels` of the mixer.

    Args:
        x: [tokens, local channels], this rank's part of the mixer's output.
        gate: like x.
        weight: [local channels].
        channels: channels on all ranks together.
        sum_over_ranks: adds up fp32 [tokens, 1] over the ranks.

    Returns:
        [tokens, local channels] in x's dtype; computed in fp32.
    """
    gated = x.float() * F.silu(gate.float())
    mean_square = sum_over_ranks(gated.square().sum(-1, keepdim=True)) / channels
    return weight * (gated * torch.rsqrt(mean_square + eps)).to(x.dtype)
