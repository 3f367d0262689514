"""The recurrence over packed prefills on a GPU: vLLM's Triton kernels."""

import torch
from vllm.model_executor.layers.mamba.ops import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_state_passing
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

from vllm_bamba.compat import autotuned_kernels, fix_launches
from vllm_bamba.ops.ssd_prefill.tuning import launches_for
from vllm_bamba.state import PrefillPlan

MODULES = (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_state_passing)


def use_tuned_launches(head_dim: int, state: int, chunk_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Have the kernels launched as the table says, where it has this GPU.

    Returns:
        Whether nothing is left to be tried out.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    capability = torch.cuda.get_device_capability(device)
    fix_launches(launches_for(capability, (head_dim, state, chunk_size)), *MODULES)
    return all(len(kernel.configs) == 1 for kernel in autotuned_kernels(*MODULES).values())


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    initial: torch.Tensor | None,
    plan: PrefillPlan,
    out: torch.Tensor,
    state_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Write y to `out`.

    Returns:
        States [any number, heads, head_dim, state]; which of them are the sequences' last ones, int32 [sequences]; and,
        with `plan.inner`, which are the inner ones, likewise.
    """
    states = mamba_chunk_scan_combined_varlen(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=plan.chunk_size,
        cu_seqlens=plan.query_start_loc,
        cu_chunk_seqlens=plan.chunk_start_loc,
        last_chunk_indices=plan.last_chunk,
        seq_idx=plan.chunk_sequence,
        out=out,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_intermediate_states=True,
        state_dtype=state_dtype,
    )
    return states, plan.last_chunk, None if plan.inner is None else plan.inner.chunks
