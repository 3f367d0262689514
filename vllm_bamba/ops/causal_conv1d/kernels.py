"""The convolution on a GPU: vLLM's Triton kernels."""

import torch
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from vllm_bamba.state import DecodePlan, PrefillPlan


def prefill(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: PrefillPlan
) -> torch.Tensor:
    return causal_conv1d_fn(
        x.transpose(0, 1),
        weight,
        bias,
        activation="silu",
        conv_states=conv_state,
        has_initial_state=plan.continues,
        cache_indices=plan.slots,
        metadata=plan.conv_metadata,
        query_start_loc=plan.query_start_loc,
    ).transpose(0, 1)


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: DecodePlan
) -> torch.Tensor:
    return causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        "silu",
        conv_state_indices=plan.slots,
        num_accepted_tokens=plan.accepted,
        query_start_loc=plan.query_start_loc,
        max_query_len=plan.slots.size(-1),
    )
