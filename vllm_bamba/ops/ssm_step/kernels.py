"""The step on a GPU: vLLM's kernels (Triton, or what `--mamba-backend` names)."""

import torch
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import selective_state_update
from vllm.platforms import current_platform

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
        dt_bias[:, None].expand(per_channel),
        dt_softplus=softplus,
        state_batch_indices=plan.slots,
        dst_state_batch_indices=plan.slots,
        out=out,
        num_accepted_tokens=plan.accepted,
        cu_seqlens=plan.query_start_loc,
        is_blackwell=current_platform.is_device_capability_family(100),
    )
