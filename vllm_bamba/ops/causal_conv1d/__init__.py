"""Depthwise causal convolution with SiLU over the channels x, B and C of a Mamba-2 mixer.

y[t, c] = silu(bias[c] + sum_k weight[c, k] * x[t - width + 1 + k, c]), where x before a sequence's first new token
comes from its slot.
"""

import torch
from vllm.platforms import current_platform

from vllm_bamba.state import DecodePlan, PrefillPlan

if current_platform.is_cpu():
    from vllm_bamba.ops.causal_conv1d.cpu import prefill, step
else:
    from vllm_bamba.ops.causal_conv1d.kernels import prefill, step


def causal_conv1d_prefill(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: PrefillPlan
) -> torch.Tensor:
    """Convolve packed prefills and leave each sequence's last inputs in its slot.

    Args:
        x: [tokens, channels], the channels next to each other in memory.
        weight: [channels, width].
        bias: [channels] or None.
        conv_state: [slots, channels, >= width - 1], read where `plan.continues`, written in place, also in the slots of
            `plan.inner`.
        plan: the batch's prefills.

    Returns:
        [tokens, channels] in x's dtype.
    """
    _check(x, weight, conv_state, plan.num_tokens)
    y = prefill(x, weight, bias, conv_state, plan)
    if plan.inner is not None:
        count = weight.shape[1] - 1
        inputs = x[plan.inner.inputs[:, -count:]].transpose(1, 2)
        conv_state[plan.inner.slots, :, :count] = inputs.to(conv_state.dtype)
    return y


def causal_conv1d_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, plan: DecodePlan
) -> torch.Tensor:
    """Convolve one token a sequence (with speculation: a few) and shift its slot's inputs.

    Args and result as `causal_conv1d_prefill`; x [rows, channels] is overwritten on a GPU.
    """
    _check(x, weight, conv_state, plan.num_tokens)
    return step(x, weight, bias, conv_state, plan)


def _check(x: torch.Tensor, weight: torch.Tensor, conv_state: torch.Tensor, num_tokens: int) -> None:
    channels, width = weight.shape
    if x.shape != (num_tokens, channels) or conv_state.shape[1] != channels or conv_state.shape[2] < width - 1:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and conv_state {tuple(conv_state.shape)} do not fit: "
            f"expected [{num_tokens}, channels], [channels, width], [slots, channels, >= width - 1]"
        )
