"""A slot of the fused step as the tensors that a prefill works with, and back (layout in ../README.md)."""

import torch

from vllm_bamba.ops.slot_state.kernels import read_kernel, write_kernel
from vllm_bamba.state import FusedSlots, PrefillPlan, slot_strides


def read_inputs(slots: FusedSlots, plan: PrefillPlan) -> torch.Tensor:
    """The convolution's last inputs of each sequence before its new tokens, oldest first.

    Returns:
        [sequences, channels, width - 1] over memory of [sequences, width - 1, channels].
    """
    return slots.conv[plan.slots[:, None].long(), _entries(_before(plan), slots.conv.shape[1])].transpose(1, 2)


def write_inputs(slots: FusedSlots, plan: PrefillPlan, inputs: torch.Tensor) -> None:
    """Put back what `read_inputs` gave and the convolution has moved on."""
    slots.conv[plan.slots[:, None].long(), _entries(plan.lengths, slots.conv.shape[1])] = inputs.transpose(1, 2)


def read_states(slots: FusedSlots, A: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    """The SSM state of each sequence before its new tokens, zero where there are none; `A` is [heads], fp32.

    Returns:
        fp32 [sequences, heads, head_dim, state].
    """
    sequences, (heads, head_dim, state) = len(plan.slots), slots.ssm.shape[1:]
    states = torch.empty(sequences, heads, head_dim, state, dtype=torch.float32, device=slots.ssm.device)
    tensors = (slots.ssm, slots.scale, slots.ring_x, slots.ring_b, slots.ring_dt)
    read_kernel[heads, sequences](
        states,
        A,
        plan.slots,
        _before(plan),
        plan.continues,
        *tensors,
        *slot_strides(tensors),
        **slots.constants(),
    )
    return states


def write_states(slots: FusedSlots, plan: PrefillPlan, states: torch.Tensor) -> None:
    """Store each sequence's SSM state, fp32 [sequences, heads, head_dim, state], and empty its ring."""
    sequences, heads = states.shape[:2]
    constants = slots.constants()
    del constants["GROUPS"]
    tensors = (slots.ssm, slots.scale, slots.ring_dt)
    write_kernel[heads, sequences](
        states.contiguous(),
        plan.slots,
        plan.lengths,
        *tensors,
        *slot_strides(tensors),
        **constants,
    )


def _before(plan: PrefillPlan) -> torch.Tensor:
    """Tokens of each sequence before the new ones."""
    return plan.lengths - plan.query_start_loc.diff()


def _entries(length: torch.Tensor, width: int) -> torch.Tensor:
    """Ring entries of the last width - 1 of `length` [sequences] tokens, oldest first."""
    return (length[:, None] + torch.arange(1 - width, 0, device=length.device)) % width
