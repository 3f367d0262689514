"""A slot of the fused step as the tensors that a prefill works with, and back; to another slot (../README.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from vllm_bamba.ops.slot_state.kernels import move_kernel, read_kernel, write_kernel
from vllm_bamba.state import FusedSlots, PrefillPlan, slot_strides

BLOCK = 1024  # channels of the convolution that a program moves


@dataclass(frozen=True)
class LayerSlots:
    """The slots of several layers, and what says which of them a sequence has.

    Attributes:
        first: the first layer's; the others' have the same strides.
        offsets: int64 [layers], how far each layer's lie behind them, in 16 bytes.
        A: int64 [layers], addresses of each layer's decays, fp32 [heads].
        groups: int32 [layers], the layer's group: layers of one share slots' numbers.
        tables: int64 [groups], addresses of the groups' tables of slots, int32 [rows, columns].
        tables_stride: from row to row of a table.
    """

    first: FusedSlots
    offsets: torch.Tensor
    A: torch.Tensor
    groups: torch.Tensor
    tables: torch.Tensor
    tables_stride: int

    @classmethod
    def of(
        cls,
        slots: Sequence[FusedSlots],
        A: Sequence[torch.Tensor],
        groups: Sequence[int],
        tables: Sequence[torch.Tensor],
    ) -> LayerSlots:
        """Describe tensors, which must stay where they are.

        Args:
            slots, A, groups: one entry a layer; `groups` are indices of `tables`.
            tables: one a group.

        Raises:
            ValueError: layers' slots are not laid out alike, or tables are not.
        """
        device, first = slots[0].conv.device, slots[0]
        offsets = [_distances(first, of_layer) for of_layer in slots]
        alike = all(slot_strides(of_layer.tensors) == slot_strides(first.tensors) for of_layer in slots)
        strides = {table.stride() for table in tables}
        if not alike or any(len(found) > 1 for found in offsets) or len(strides) > 1 or next(iter(strides))[1] != 1:
            raise ValueError("slots of layers, or tables of groups, are not laid out alike")
        return cls(
            first=first,
            offsets=torch.tensor([found.pop() for found in offsets], device=device),
            A=torch.tensor([of_layer.data_ptr() for of_layer in A], device=device),
            groups=torch.tensor(groups, dtype=torch.int32, device=device),
            tables=torch.tensor([table.data_ptr() for table in tables], device=device),
            tables_stride=tables[0].stride(0),
        )


def _distances(first: FusedSlots, other: FusedSlots) -> set[int]:
    """Of the tensors of one layer from those of another, in 16 bytes."""
    pairs = zip(first.tensors, other.tensors, strict=True)
    bytes_ = {b.data_ptr() - a.data_ptr() for a, b in pairs if a is not None and b is not None}
    if any(distance % 16 for distance in bytes_):
        raise ValueError("slots of layers do not begin at multiples of 16 bytes from each other")
    return {distance // 16 for distance in bytes_}


def empty_inputs(slots: FusedSlots, sequences: int) -> torch.Tensor:
    """Room for the last inputs of each sequence's convolution, oldest first, behind that of no sequence.

    vLLM's convolution takes slot 0 for padding: sequence i has row i + 1.

    Returns:
        [1 + sequences, channels, width - 1] over memory of [1 + sequences, width - 1, channels].
    """
    width, channels = slots.constants()["WIDTH"], slots.conv.shape[2]
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
        *slots.of_step, *slot_strides(slots.of_step), **_constants(slots),
    )  # fmt: skip
    return states


def write_slots(
    slots: FusedSlots,
    places: torch.Tensor,
    lengths: torch.Tensor,
    inputs: torch.Tensor,
    states: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Store what sequences have after some of their tokens, with empty rings.

    Args:
        slots: written in place.
        places: int32 [sequences], which slots; nothing is written to slot 0.
        lengths: int32 [sequences], tokens of each sequence up to there.
        inputs: of the convolution, as `empty_inputs` lays them out and in the dtype of its slots.
        states: fp32 [any number, heads, head_dim, state].
        rows: int32 [sequences], which of `states` are theirs.

    Raises:
        ValueError: `inputs` is laid out in another way.
    """
    width, channels = slots.constants()["WIDTH"], slots.conv.shape[2]
    if inputs.shape != (1 + len(rows), channels, width - 1) or not inputs.transpose(1, 2).is_contiguous():
        raise ValueError(f"inputs {tuple(inputs.shape)} of {inputs.dtype} are not laid out as by `empty_inputs`")
    tensors = (slots.conv, slots.ssm, slots.scale, slots.ring_dt, slots.anchor_conv, slots.anchor)
    write_kernel[_programs(slots), len(rows)](
        inputs, states.contiguous(), rows, places, lengths, *tensors, *slot_strides(tensors),
        **_constants(slots), ANCHORED=slots.anchor is not None,
    )  # fmt: skip


def move_slots(layers: LayerSlots, moves: torch.Tensor) -> None:
    """Have sequences go on in other slots, or in the same, in all layers: rings are folded and anchors set.

    A slot in which a sequence has ended serves others, too. To those that have as many tokens as its anchor says it
    gives the checkpoint alone, to those that have more what is in the ring as well. Where there is nothing to fold, a
    state is copied bit by bit.

    Args:
        layers: whose slots are anchored.
        moves: int32 [sequences, 4], contiguous: the sequence's row of the tables, its tokens, and the columns in which
            its old and its new slot stand.
    """
    slots = layers.first
    move_kernel[_programs(slots), len(moves), len(layers.offsets)](
        moves, layers.tables, layers.groups, layers.offsets, layers.A, *slots.tensors,
        layers.tables_stride, *slot_strides(slots.tensors), **_constants(slots),
    )  # fmt: skip


def _programs(slots: FusedSlots) -> int:
    """Of a sequence: one a head, then those that move inputs of the convolution."""
    return slots.ssm.shape[1] + triton.cdiv(slots.conv.shape[2], BLOCK)


def _constants(slots: FusedSlots) -> dict[str, object]:
    return slots.constants() | {"BLOCK": BLOCK}
