"""A slot of the fused step as the tensors that a prefill works with, and back (layout in ../README.md)."""

import torch
import triton

from vllm_bamba.ops.slot_state.kernels import read_kernel, write_kernel
from vllm_bamba.state import FusedSlots, PrefillPlan, slot_strides

BLOCK = 1024  # channels of the convolution that a program moves


def empty_inputs(slots: FusedSlots, sequences: int) -> torch.Tensor:
    """Room for the last inputs of each sequence's convolution, oldest first, behind that of no sequence.

    vLLM's convolution takes slot 0 for padding: sequence i has row i + 1.

    Returns:
        [1 + sequences, channels, width - 1] over memory of [1 + sequences, width - 1, channels].
    """
    _, width, channels = slots.conv.shape
    return slots.conv.new_empty(1 + sequences, width - 1, channels).transpose(1, 2)


def read_slots(slots: FusedSlots, A: torch.Tensor, plan: PrefillPlan, inputs: torch.Tensor) -> torch.Tensor:
    """What each sequence has before its new tokens.

    Args:
        slots: not changed.
        A: [heads], fp32.
        plan: which slots, and how many tokens each sequence has with its new ones.
        inputs: made by `empty_inputs`, takes those of the convolution; what it gets of a sequence that only begins is
            undefined.

    Returns:
        SSM states, fp32 [sequences, heads, head_dim, state], zero for sequences that only begin.
    """
    sequences, (heads, head_dim, state) = len(plan.slots), slots.ssm.shape[1:]
    states = torch.empty(sequences, heads, head_dim, state, dtype=torch.float32, device=slots.ssm.device)
    read_kernel[_programs(slots), sequences](
        inputs, states, A, plan.slots, plan.lengths, plan.query_start_loc, plan.continues,
        *slots, *slot_strides(slots), **_constants(slots),
    )  # fmt: skip
    return states


def write_slots(
    slots: FusedSlots, places: torch.Tensor, lengths: torch.Tensor, inputs: torch.Tensor, states: torch.Tensor
) -> None:
    """Store what sequences have after some of their tokens, with empty rings.

    Args:
        slots: written in place.
        places: int32 [sequences], which slots; nothing is written to slot 0.
        lengths: int32 [sequences], tokens of each sequence up to there.
        inputs: of the convolution, as `empty_inputs` lays them out and in the dtype of its slots.
        states: fp32 [sequences, heads, head_dim, state].

    Raises:
        ValueError: `inputs` is laid out in another way.
    """
    _, width, channels = slots.conv.shape
    if inputs.shape != (1 + len(states), channels, width - 1) or not inputs.transpose(1, 2).is_contiguous():
        raise ValueError(f"inputs {tuple(inputs.shape)} of {inputs.dtype} are not laid out as by `empty_inputs`")
    tensors = (slots.conv, slots.ssm, slots.scale, slots.ring_dt)
    write_kernel[_programs(slots), len(states)](
        inputs, states.contiguous(), places, lengths, *tensors, *slot_strides(tensors), **_constants(slots)
    )


def _programs(slots: FusedSlots) -> int:
    """Of a sequence: one a head, then those that move inputs of the convolution."""
    return slots.ssm.shape[1] + triton.cdiv(slots.conv.shape[2], BLOCK)


def _constants(slots: FusedSlots) -> dict[str, object]:
    return slots.constants() | {"WIDTH": slots.conv.shape[1], "BLOCK": BLOCK}
