"""One decode step of a mixer between its projections: convolution, recurrence, gate (equations in ../README.md)."""

from typing import NamedTuple

import torch

from vllm_bamba.ops.mixer_step.kernels import step_kernel
from vllm_bamba.ops.mixer_step.tuning import Launch, launch_for
from vllm_bamba.state import DecodePlan, FusedSlots, slot_strides


class StepWeights(NamedTuple):
    """A mixer's parameters on this rank.

    Attributes:
        taps: [width, channels], the convolution's weights.
        conv_bias: [channels] or None.
        A, D, dt_bias: [heads]; A in fp32 and negative.
        norm: [channels of x], weights of the gated norm; None where the norm is left to the caller.
    """

    taps: torch.Tensor
    conv_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor | None


def sum_columns(heads: int, launch: Launch) -> int:
    """Columns behind the channels of `mixer_step`'s output for the sums of squares of a gated row."""
    return 2 * (heads // launch.heads_per_program)


def mixer_step(
    projected: torch.Tensor,
    weights: StepWeights,
    dt_limit: tuple[float, float],
    slots: FusedSlots,
    plan: DecodePlan,
    out: torch.Tensor,
    launch: Launch | None = None,
) -> None:
    """Advance each row's slot by one token; rows whose slot is 0 are padding and give zeros.

    Without `weights.norm` y goes to `out` [rows, channels of x]. With it, `out` is [rows, channels of x + sums]: it
    gets norm * y * silu(gate), and in the last `sum_columns` columns numbers whose sum is that of the squares of
    y * silu(gate), for `divide_later` of the gated norm.

    Args:
        projected: [rows, gate | x | B | C | dt].
        weights: the mixer's.
        dt_limit: bounds of the time step after softplus.
        slots: read and written in place.
        plan: the batch's decodes, without speculation.
        out: see above; its rows may be parts of longer ones.
        launch: how; by default what is tuned for the GPU.

    Raises:
        ValueError: shapes do not fit each other.
    """
    constants = slots.constants()
    heads, head_dim, groups, state = (constants[k] for k in ("HEADS", "HEAD_DIM", "GROUPS", "STATE"))
    launch = launch or launch_for(projected.device, heads // groups)
    rows, width = len(projected), slots.conv.shape[1]
    inner, channels = heads * head_dim, slots.conv.shape[2]
    columns = inner + (0 if weights.norm is None else sum_columns(heads, launch))
    if (
        projected.shape != (plan.num_tokens, inner + channels + heads)
        or out.shape != (rows, columns)
        or weights.taps.shape != (width, channels)
        or not weights.A.shape == weights.D.shape == weights.dt_bias.shape == (heads,)
    ):
        raise ValueError(
            f"projected {tuple(projected.shape)}, out {tuple(out.shape)}, taps {tuple(weights.taps.shape)} and A "
            f"{tuple(weights.A.shape)} do not fit slots of {heads} heads x {head_dim} x {state}, {channels} channels "
            f"and a plan of {plan.num_tokens} tokens: expected {inner + channels + heads} and {columns} columns"
        )
    step_kernel[heads // launch.heads_per_program, rows](
        projected,
        out,
        weights.taps,
        weights.conv_bias,
        weights.A,
        weights.D,
        weights.dt_bias,
        weights.norm,
        plan.slots,
        plan.lengths,
        *slots,
        projected.stride(0),
        out.stride(0),
        plan.slots.stride(0),
        *slot_strides(slots),
        *dt_limit,
        **constants,
        WIDTH=width,
        HEADS_PER_PROGRAM=launch.heads_per_program,
        BIAS=weights.conv_bias is not None,
        GATED=weights.norm is not None,
        PLAIN=slots.ring_dt is None or rows < launch.replay_from,
        num_warps=launch.num_warps,
    )
