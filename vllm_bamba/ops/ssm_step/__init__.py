"""One step of the state-space recurrence for a batch of sequences (equations in ../README.md)."""

import torch
import torch.nn.functional as F
from vllm.platforms import current_platform

from vllm_bamba.config import NO_TIME_STEP_LIMIT
from vllm_bamba.state import DecodePlan

if current_platform.is_cpu():
    from vllm_bamba.ops.ssm_step.cpu import step
else:
    from vllm_bamba.ops.ssm_step.kernels import step


def ssm_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    ssm_state: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
) -> None:
    """Advance each row's slot by one token and write y to `out`; rows whose slot is 0 are padding.

    Args:
        x: [rows, heads, head_dim].
        dt: [rows, heads], before bias, softplus and clamp to `dt_limit`.
        A, D, dt_bias: [heads]; A in fp32 and negative.
        B, C: [rows, groups, state].
        ssm_state: [slots, heads, head_dim, state], updated in place.
        plan: the batch's decodes.
        out: [rows, heads, head_dim].
    """
    rows, heads, head_dim = x.shape
    if (
        rows != plan.num_tokens
        or dt.shape != (rows, heads)
        or B.shape != C.shape
        or heads % B.shape[1]
        or not A.shape == D.shape == dt_bias.shape == (heads,)
        or out.shape != x.shape
        or ssm_state.shape[1:] != (heads, head_dim, B.shape[-1])
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, B {tuple(B.shape)}, out {tuple(out.shape)} and ssm_state {tuple(ssm_state.shape)} "
            f"do not fit each other and {plan.num_tokens} tokens"
        )
    softplus = dt_limit == NO_TIME_STEP_LIMIT
    if not softplus:  # the kernels know no limit, so they get time steps that are ready
        dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
        dt_bias = torch.zeros_like(dt_bias)
    step(x, dt, A, B, C, D, dt_bias, softplus, ssm_state, plan, out)
