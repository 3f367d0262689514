"""The recurrence over packed prefills on a GPU: vLLM's Triton kernels."""

import functools

import torch
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

from vllm_bamba.state import PrefillPlan


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
) -> torch.Tensor:
    """Write y to `out`; return the last states [sequences, heads, head_dim, state]."""
    return mamba_chunk_scan_combined_varlen(
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
        state_dtype=state_dtype,
    )


@functools.cache
def warm_up(
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    chunk_size: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compile and tune the kernels for these sizes, once a process, before vLLM gives the memory to the cache."""
    like = functools.partial(torch.zeros, device=device)
    offsets = torch.tensor([0, chunk_size], dtype=torch.int32, device=device)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    plan = PrefillPlan(
        num_tokens=chunk_size,
        slots=one,
        lengths=offsets[1:],
        query_start_loc=offsets,
        continues=one.bool(),
        any_continues=False,
        chunk_size=chunk_size,
        chunk_start_loc=offsets,
        chunk_sequence=one,
        last_chunk=one,
        conv_metadata=None,
    )
    x = like(chunk_size, heads, head_dim, dtype=dtype)
    bc = like(chunk_size, groups, state, dtype=dtype)
    rates = like(heads, dtype=torch.float32)
    for initial in (None, like(1, heads, head_dim, state, dtype=state_dtype)):
        scan(
            x,
            like(chunk_size, heads, dtype=dtype),
            rates - 1,
            bc,
            bc,
            rates.to(dtype),
            rates.to(dtype),
            (0.0, float("inf")),
            initial,
            plan,
            torch.empty_like(x),
            state_dtype,
        )
