"""A linear map in the precision of its inputs."""

import torch


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, K], weight [N, K]; returns [rows, N]."""
    return x @ weight.t()
