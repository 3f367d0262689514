"""The convolution without a GPU: vLLM's C++ step, and its torch prefill."""

import torch
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu

from vllm_bamba.state import DecodePlan, PrefillPlan


def prefill(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: PrefillPlan
) -> torch.Tensor:
    return causal_conv1d_fn_cpu(
        x.transpose(0, 1),
        weight,
        bias,
        conv_state,
        plan.query_start_loc,
        cache_indices=plan.slots,
        has_initial_state=plan.continues,
        activation="silu",
    ).transpose(0, 1)


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: DecodePlan
) -> torch.Tensor:
    return causal_conv1d_update_cpu(x, conv_state, weight, bias, "silu", conv_state_indices=plan.slots[:, 0])
