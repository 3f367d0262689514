"""The step without a GPU: vLLM's C++ kernel."""

import torch
from vllm.model_executor.layers.mamba.ops.cpu.mamba_ssm import selective_state_update

from vllm_bamba.state import DecodePlan


def step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus: bool,
    ssm_state: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
) -> None:
    per_channel = (-1, x.shape[2])
    selective_state_update(
        ssm_state,
        x,
        dt[..., None].expand(-1, *per_channel),
        A[:, None, None].expand(*per_channel, B.shape[-1]),
        B,
        C,
        D[:, None].expand(per_channel),
        dt_bias=dt_bias[:, None].expand(per_channel),
        dt_softplus=softplus,
        state_batch_indices=plan.slots,
        dst_state_batch_indices=plan.slots,
        out=out,
    )
