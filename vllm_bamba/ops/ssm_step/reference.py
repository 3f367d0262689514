"""One step of the recurrence in plain torch, in the precision of its inputs."""

import torch
import torch.nn.functional as F


def ssm_step_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as `ssm_step`, with the rows' own states [rows, heads, head_dim, state].

    Returns:
        y [rows, heads, head_dim] and the new states.
    """
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)  # [rows, heads]
    per_group = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(per_group, dim=1) for t in (B, C))  # [rows, heads, state]
    state = (dt * A).exp()[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None]
    return torch.einsum("rhpn,rhn->rhp", state, C) + D[:, None] * x, state
