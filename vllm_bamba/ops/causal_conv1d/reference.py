"""The convolution of one sequence in plain torch, in the precision of its inputs."""

import torch
import torch.nn.functional as F


def causal_conv1d_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve x [tokens, channels] that follows the inputs `before` [channels, width - 1].

    Returns:
        y [tokens, channels] and the last width - 1 inputs [channels, width - 1].
    """
    inputs = torch.cat([before, x.T], dim=1)  # [channels, width - 1 + tokens]
    windows = inputs.unfold(1, weight.shape[1], 1)  # [channels, tokens, width]
    y = (windows * weight[:, None]).sum(-1)
    if bias is not None:
        y = y + bias[:, None]
    return F.silu(y).T, inputs[:, inputs.shape[1] - weight.shape[1] + 1 :]
