"""One decode step of a mixer between its projections: convolution, recurrence, gate (equations in ../README.md)."""

from typing import Any, NamedTuple

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

    @property
    def of_kernels(self) -> tuple[torch.Tensor | None, ...]:
        """All but the norm's, in the order of kernels' arguments."""
        return self[:-1]


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
    heads, head_dim, state, width = (constants[k] for k in ("HEADS", "HEAD_DIM", "STATE", "WIDTH"))
    tokens, drafts = len(projected), slots.drafts
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
    if drafts and (slots.anchor is not None or constants["REPLAY"] <= 2 * drafts):
        ring = constants["REPLAY"]
        raise ValueError(f"{drafts} tokens cannot be taken back from a ring of {ring}, or behind an anchor")
    step = _Step(projected, weights, dt_limit, slots, plan, out, constants, num_warps)
    if not constants["REPLAY"]:
        step.write()
    elif drafts:
        step.replay_drafts()
    else:
        step.replay()


class _Step(NamedTuple):
    """What `mixer_step` was given, after its checks, and the sizes that all kernels are told."""

    projected: torch.Tensor
    weights: StepWeights
    dt_limit: tuple[float, float]
    slots: FusedSlots
    plan: DecodePlan
    out: torch.Tensor
    constants: dict[str, Any]
    num_warps: int

    def write(self) -> None:
        """States are written at once."""
        projected, out, plan, states = self.projected, self.out, self.plan, self.slots.of_step[:3]
        constants = self._told()
        del constants["REPLAY"], constants["DRAFTS"]
        step_kernel[constants["HEADS"], len(plan.slots)](
            projected, out, *self.weights.of_kernels, self.weights.norm, plan.slots, plan.lengths, *states,
            projected.stride(0), out.stride(0), plan.slots.stride(0), *slot_strides(states), *self.dt_limit,
            **constants, GATED=self._gated, num_warps=self.num_warps,
        )  # fmt: skip

    def replay(self) -> None:
        """With a ring of tokens whose state is still to be written."""
        projected, weights, slots, plan, out = self.projected, self.weights, self.slots, self.plan, self.out
        early, convolved, c_parts, strides = self._beside_states()
        constants, fold = self._told(), slots.anchor is None
        heads, head_dim, groups = (constants[k] for k in ("HEADS", "HEAD_DIM", "GROUPS"))
        factors = projected.new_empty(len(projected), heads * (constants["REPLAY"] + 4), dtype=torch.float32)
        turns = fold_turns(heads, constants["REPLAY"], 0)
        del constants["DRAFTS"], turns["PLACES"]
        prepare = prepare_for(slots)
        of_group, folded = heads // groups, min(prepare.folded, head_dim)
        some_heads = min(prepare.heads, triton.next_power_of_2(of_group))
        folds = turns["FOLDED"] * (head_dim // folded) if fold else 0
        programs = folds + groups * -(-of_group // some_heads)  # as the kernel counts them
        constants |= {"FOLD": fold, "EARLY": early, "INTEGERS": c_parts is not None}
        prepare_kernel[programs, len(plan.slots)](
            projected, convolved, factors, c_parts, *weights.of_kernels, plan.slots, plan.lengths, *slots.of_step,
            projected.stride(0), *strides, *self.dt_limit,
            **constants, **turns, BLOCK_HEADS=some_heads, FOLD_DIM=folded, num_warps=prepare.num_warps,
        )  # fmt: skip
        replay_kernel[heads, len(plan.slots)](
            projected, convolved, factors, c_parts, out, weights.taps, weights.conv_bias, weights.norm,
            plan.slots, plan.lengths, *slots.of_step, projected.stride(0), out.stride(0), *strides,
            **constants, GATED=self._gated, PERIOD=turns["PERIOD"], num_warps=self.num_warps, **_behind(early),
        )  # fmt: skip

    def replay_drafts(self) -> None:
        """The same for sequences of several tokens, of which some may be taken back."""
        projected, weights, slots, plan, out = self.projected, self.weights, self.slots, self.plan, self.out
        early, convolved, c_parts, strides = self._beside_states()
        constants = self._told()
        heads, head_dim, groups = (constants[k] for k in ("HEADS", "HEAD_DIM", "GROUPS"))
        constants |= {"TOKENS": tile_of_tokens(slots.drafts), "EARLY": early, "INTEGERS": c_parts is not None}
        columns = constants["REPLAY"] + constants["TOKENS"] + 4
        products = projected.new_empty(len(projected), groups * columns, dtype=torch.float32)
        turns, folded = fold_turns(heads, constants["REPLAY"], slots.drafts), min(PREPARE_DRAFTS.folded, head_dim)
        programs = turns["FOLDED"] * turns["PLACES"] * (head_dim // folded) + groups  # as the kernel counts them
        of_rows = (plan.slots, plan.lengths, plan.query_start_loc)
        out.zero_()  # a graph has tokens that no sequence of its batch may own
        prepare_drafts_kernel[programs, len(plan.slots)](
            projected, convolved, products, c_parts, weights.taps, weights.conv_bias, weights.A,
            *of_rows, *slots.of_step, projected.stride(0), *strides,
            **constants, **turns, FOLD_DIM=folded, num_warps=PREPARE_DRAFTS.num_warps,
        )  # fmt: skip
        replay_drafts_kernel[heads, len(plan.slots)](
            projected, convolved, products, c_parts, out, *weights.of_kernels, weights.norm,
            *of_rows, *slots.of_step, projected.stride(0), out.stride(0), *strides, *self.dt_limit,
            **constants, GATED=self._gated, PERIOD=turns["PERIOD"], num_warps=self.num_warps, **_behind(early),
        )  # fmt: skip

    @property
    def _gated(self) -> bool:
        return self.weights.norm is not None

    def _told(self) -> dict[str, Any]:
        """What every kernel is told, to be added to."""
        return self.constants | {"BIAS": self.weights.conv_bias is not None}

    def _beside_states(self) -> tuple[bool, torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
        """What the two kernels of a replayed step are given beside states.

        Returns:
            Whether the second one starts early; room for B and C after the convolution and, where they multiply
            integers, for C as such; strides of the table of slots and of these.
        """
        projected, constants, device = self.projected, self.constants, self.projected.device
        inner, of_group = constants["HEADS"] * constants["HEAD_DIM"], INTEGER_PARTS.value * constants["STATE"]
        convolved, c_parts = projected.new_empty(len(projected), self.slots.conv.shape[2] - inner), None
        if multiplies_integers(self.slots, projected.dtype):
            c_parts = projected.new_empty(len(projected), constants["GROUPS"] * of_group, dtype=torch.int8)
        strides = (self.plan.slots.stride(0), *slot_strides(self.slots.of_step))
        return starts_early(device), convolved, c_parts, strides


def _behind(early: bool) -> dict[str, bool]:
    """How a kernel is launched that may start while the one in front is at work."""
    return {"launch_pdl": True} if early else {}
