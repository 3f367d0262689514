"""One decode step of a mixer for one sequence in plain torch, in the precision of its inputs."""

import torch
import torch.nn.functional as F

from vllm_bamba.ops.causal_conv1d.reference import causal_conv1d_reference
from vllm_bamba.ops.ssm_step.reference import ssm_step_reference


def mixer_step_reference(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    inputs: torch.Tensor,
    state: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advance one sequence by one token.

    Args:
        projected: [gate | x | B | C | dt].
        conv_weight, conv_bias: [channels, width], [channels] or None.
        A, D, dt_bias: [heads].
        inputs: [channels, width - 1], the convolution's last inputs.
        state: [heads, head_dim, state].
        groups: groups of heads that share B and C.

    Returns:
        y [channels of x] before the gate, y * silu(gate), the last inputs and the new state.
    """
    heads, head_dim, width = state.shape
    inner, bc = heads * head_dim, groups * width
    gate, xbc, dt = projected.split([inner, inner + 2 * bc, heads])
    xbc, inputs = causal_conv1d_reference(xbc[None], conv_weight, conv_bias, inputs)
    x, B, C = xbc.split([inner, bc, bc], dim=1)
    y, new = ssm_step_reference(
        x.view(1, heads, head_dim),
        dt[None],
        A,
        B.view(1, groups, width),
        C.view(1, groups, width),
        D,
        dt_bias,
        dt_limit,
        state[None],
    )
    return y.flatten(), y.flatten() * F.silu(gate), inputs, new[0]
