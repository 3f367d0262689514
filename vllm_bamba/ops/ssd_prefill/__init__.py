"""The state-space recurrence over packed prefills (SSD, arXiv:2405.21060; equations in ../README.md)."""

import functools

import torch
from vllm.platforms import current_platform

from vllm_bamba.config import NO_TIME_STEP_LIMIT
from vllm_bamba.ops.ssd_prefill.kernels import use_tuned_launches
from vllm_bamba.state import PrefillPlan
from vllm_bamba.warm_up import warm_ups

if current_platform.is_cpu():
    from vllm_bamba.ops.ssd_prefill.cpu import scan
else:
    from vllm_bamba.ops.ssd_prefill.kernels import scan

__all__ = ["scan", "ssd_prefill", "warm_up"]


def ssd_prefill(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    ssm_state: torch.Tensor,
    plan: PrefillPlan,
    out: torch.Tensor,
) -> None:
    """Run each sequence from its slot's state (or zero), write y to `out` and the last state to the slot.

    States that `plan.inner` wants go to slots of their own.

    Args:
        x: [tokens, heads, head_dim].
        dt: [tokens, heads], before bias, softplus and clamp to `dt_limit`.
        A, D, dt_bias: [heads]; A in fp32 and negative.
        B, C: [tokens, groups, state].
        ssm_state: [slots, heads, head_dim, state], read where `plan.continues`, written in place.
        plan: the batch's prefills.
        out: [tokens, heads, head_dim], contiguous.
    """
    tokens, heads, head_dim = x.shape
    if (
        tokens != plan.num_tokens
        or dt.shape != (tokens, heads)
        or B.shape != C.shape
        or heads % B.shape[1]
        or not A.shape == D.shape == dt_bias.shape == (heads,)
        or out.shape != x.shape
        or ssm_state.shape[1:] != (heads, head_dim, B.shape[-1])
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)}, out {tuple(out.shape)} and ssm_state "
            f"{tuple(ssm_state.shape)} do not fit each other and {plan.num_tokens} tokens"
        )
    initial = None
    if plan.any_continues:
        initial = torch.where(plan.continues[:, None, None, None], ssm_state[plan.slots], 0)
    states, last, inner = scan(x, dt, A, B, C, D, dt_bias, dt_limit, initial, plan, out, ssm_state.dtype)
    ssm_state[plan.slots] = states[last]
    if plan.inner is not None:
        ssm_state[plan.inner.slots] = states[inner]


@functools.cache
def warm_up(
    x: tuple[int, int],
    B: tuple[int, int],
    chunk_size: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Have the kernels for one model made before its cache takes the memory; nothing is left to do the second time.

    A prompt of one chunk goes through slot 0 of a cache made for it, first as a new sequence, then as the rest of an
    old one: starting from a state is another kernel.

    Args:
        x: heads and head_dim.
        B: groups and state.
        chunk_size, dtype, state_dtype, device: what the requests will have.
    """
    if device.type == "cpu":
        return  # the C++ kernel is made already

    def run() -> None:
        tokens = {"dtype": dtype, "device": device}
        of_heads = torch.ones(x[0], **tokens)
        cache = torch.zeros(1, *x, B[1], dtype=state_dtype, device=device)
        for continues in (False, True):
            ssd_prefill(
                torch.ones(chunk_size, *x, **tokens),
                of_heads.expand(chunk_size, -1).contiguous(),
                -of_heads.float(),
                torch.ones(chunk_size, *B, **tokens),
                torch.ones(chunk_size, *B, **tokens),
                of_heads,
                of_heads,
                NO_TIME_STEP_LIMIT,
                cache,
                PrefillPlan.of_one_chunk(chunk_size, continues, device),
                torch.empty(chunk_size, *x, **tokens),
            )

    if use_tuned_launches(x[1], B[1], chunk_size, dtype, device):
        warm_ups.start(("ssd_prefill", x, B, chunk_size, dtype, state_dtype), lambda: [run], device)
    else:
        run()  # tries launches out, which nothing else should disturb
