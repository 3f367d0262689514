"""The recurrence of one sequence, token by token, in the precision of its inputs."""

import torch

from vllm_bamba.ops.ssm_step.reference import ssm_step_reference


def ssd_prefill_reference(
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
    """Shapes as `ssd_prefill`, for one sequence that starts from `state` [heads, head_dim, state].

    Returns:
        y [tokens, heads, head_dim] and the last state.
    """
    y, state = torch.empty_like(x), state[None]
    for t in range(len(x)):
        token = slice(t, t + 1)
        y[token], state = ssm_step_reference(x[token], dt[token], A, B[token], C[token], D, dt_bias, dt_limit, state)
    return y, state[0]
