"""One decode step of a mixer between its projections: convolution, recurrence, gate (equations in ../README.md)."""

from typing import NamedTuple

import torch
import triton

from vllm_bamba.ops.mixer_step.draft_kernels import prepare_drafts_kernel, replay_drafts_kernel
from vllm_bamba.ops.mixer_step.kernels import INTEGER_PARTS, prepare_kernel, replay_kernel, step_kernel
from vllm_bamba.ops.mixer_step.tuning import (
    PREPARE_DRAFTS,
    multiplies_integers,
    prepare_for,
    starts_early,
    warps_for,
)
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


def sum_columns(heads: int) -> int:
    """Columns behind the channels of `mixer_step`'s output for the sums of squares of a gated row: two a head."""
    return 2 * heads


def fold_turns(heads: int, replay: int, drafts: int) -> dict[str, int]:
    """Whose rings are folded when, as kernels are told.

    Returns:
        PERIOD, the tokens between two folds of a head; FOLDED, the heads, at most, that fold in front of one token;
        PLACES, the tokens of a step in front of which heads fold, but for those where the same ones would again.
    """
    period = replay - 2 * drafts
    return {"PERIOD": period, "FOLDED": -(-heads // period), "PLACES": min(1 + drafts, period)}


def tile_of_tokens(drafts: int) -> int:
    """Extent of the axis that has a sequence's tokens: a power of two, and no narrower than tensor cores take."""
    return max(8, triton.next_power_of_2(1 + drafts))


def mixer_step(
    projected: torch.Tensor,
    weights: StepWeights,
    dt_limit: tuple[float, float],
    slots: FusedSlots,
    plan: DecodePlan,
    out: torch.Tensor,
    num_warps: int | None = None,
) -> None:
    """Advance each sequence's slot by its tokens, one or with drafts a few; padding, in slot 0, gives zeros.

    Drafts are taken back by asking for less: the next step begins at the first position that was not accepted.
    Full rings are folded on the way, but not those of anchored slots: `slot_state.move_slots` does it in time.

    Without `weights.norm` y goes to `out` [tokens, channels of x]. With it, `out` is [tokens, channels of x + sums]: it
    gets norm * y * silu(gate), and in the last `sum_columns` columns numbers whose sum is that of the squares of
    y * silu(gate), for `divide_later` of the gated norm.

    Args:
        projected: [tokens, gate | x | B | C | dt].
        weights: the mixer's.
        dt_limit: bounds of the time step after softplus.
        slots: read and written in place.
        plan: the batch's decodes, of at most 1 + `slots.drafts` tokens a sequence.
        out: see above; its rows may be parts of longer ones.
        num_warps: of a head's program; by default what is tuned for the GPU and the slots.

    Raises:
        ValueError: shapes do not fit each other, or tokens cannot be taken back.
    """
    constants = slots.constants()
    heads, head_dim, groups, state = (constants[k] for k in ("HEADS", "HEAD_DIM", "GROUPS", "STATE"))
    tokens, rows, width = len(projected), len(plan.slots), constants["WIDTH"]
    drafts, fold = slots.drafts, slots.anchor is None
    if num_warps is None:
        num_warps = warps_for(slots, projected.dtype)
    inner, channels = heads * head_dim, slots.conv.shape[2]
    columns = inner + (0 if weights.norm is None else sum_columns(heads))
    if (
        projected.shape != (plan.num_tokens, inner + channels + heads)
        or out.shape != (tokens, columns)
        or weights.taps.shape != (width, channels)
        or not weights.A.shape == weights.D.shape == weights.dt_bias.shape == (heads,)
    ):
        raise ValueError(
            f"projected {tuple(projected.shape)}, out {tuple(out.shape)}, taps {tuple(weights.taps.shape)} and A "
            f"{tuple(weights.A.shape)} do not fit slots of {heads} heads x {head_dim} x {state}, {channels} channels "
            f"and a plan of {plan.num_tokens} tokens: expected {inner + channels + heads} and {columns} columns"
        )
    if bool(drafts) != (plan.query_start_loc is not None):
        raise ValueError(f"slots that can take {drafts} tokens back, and a plan with other drafts")
    if drafts and (not fold or constants["REPLAY"] <= 2 * drafts):
        ring = constants["REPLAY"]
        raise ValueError(f"{drafts} tokens cannot be taken back from a ring of {ring}, or behind an anchor")
    bias, gated = weights.conv_bias is not None, weights.norm is not None
    parameters = (weights.taps, weights.conv_bias, weights.A, weights.D, weights.dt_bias)
    if not constants["REPLAY"]:
        del constants["REPLAY"], constants["DRAFTS"]
        step_kernel[heads, rows](
            projected, out, *parameters, weights.norm, plan.slots, plan.lengths, *slots.of_step[:3],
            projected.stride(0), out.stride(0), plan.slots.stride(0), *slot_strides(slots.of_step[:3]), *dt_limit,
            **constants, BIAS=bias, GATED=gated, num_warps=num_warps,
        )  # fmt: skip
        return
    early = starts_early(projected.device)
    convolved = projected.new_empty(tokens, channels - inner)
    integers = multiplies_integers(slots, projected.dtype)
    of_token = groups * INTEGER_PARTS.value * state
    c_parts = projected.new_empty(tokens, of_token, dtype=torch.int8) if integers else None
    turns = fold_turns(heads, constants["REPLAY"], drafts)
    strides = (plan.slots.stride(0), *slot_strides(slots.of_step))
    behind = {"launch_pdl": True} if early else {}
    if drafts:
        out.zero_()  # a graph has tokens that no sequence of its batch may own
        folded = min(PREPARE_DRAFTS.folded, head_dim)
        programs = turns["FOLDED"] * turns["PLACES"] * (head_dim // folded) + groups  # as the kernel counts them
        constants |= {"TOKENS": tile_of_tokens(drafts), "BIAS": bias, "EARLY": early, "INTEGERS": integers}
        columns = constants["REPLAY"] + constants["TOKENS"] + 4
        products = projected.new_empty(tokens, groups * columns, dtype=torch.float32)
        prepare_drafts_kernel[programs, rows](
            projected, convolved, products, c_parts, weights.taps, weights.conv_bias, weights.A,
            plan.slots, plan.lengths, plan.query_start_loc, *slots.of_step, projected.stride(0), *strides,
            **constants, **turns, FOLD_DIM=folded, num_warps=PREPARE_DRAFTS.num_warps,
        )  # fmt: skip
        replay_drafts_kernel[heads, rows](
            projected, convolved, products, c_parts, out, *parameters, weights.norm,
            plan.slots, plan.lengths, plan.query_start_loc, *slots.of_step, projected.stride(0), out.stride(0),
            *strides, *dt_limit, **constants, GATED=gated, PERIOD=turns["PERIOD"], num_warps=num_warps, **behind,
        )  # fmt: skip
        return
    del constants["DRAFTS"], turns["PLACES"]
    factors = projected.new_empty(tokens, heads * (constants["REPLAY"] + 4), dtype=torch.float32)
    prepare = prepare_for(slots)
    of_group, folded = heads // groups, min(prepare.folded, head_dim)
    some_heads = min(prepare.heads, triton.next_power_of_2(of_group))
    folds = turns["FOLDED"] * (head_dim // folded) if fold else 0
    programs = folds + groups * -(-of_group // some_heads)  # as the kernel counts them
    prepare_kernel[programs, rows](
        projected, convolved, factors, c_parts, *parameters, plan.slots, plan.lengths, *slots.of_step,
        projected.stride(0), *strides, *dt_limit,
        **constants, FOLD=fold, BIAS=bias, EARLY=early, INTEGERS=integers, **turns,
        BLOCK_HEADS=some_heads, FOLD_DIM=folded, num_warps=prepare.num_warps,
    )  # fmt: skip
    replay_kernel[heads, rows](
        projected, convolved, factors, c_parts, out, weights.taps, weights.conv_bias, weights.norm,
        plan.slots, plan.lengths, *slots.of_step, projected.stride(0), out.stride(0), *strides,
        **constants, FOLD=fold, BIAS=bias, GATED=gated, EARLY=early, INTEGERS=integers, PERIOD=turns["PERIOD"],
        num_warps=num_warps, **behind,
    )  # fmt: skip
