"""The operators as `bench_ops.py` times them: one problem each, solved by every implementation that is installed.

An implementation is a function without arguments that does the work in place and returns y. All of them share the
inputs and the state slots of their case.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from op_inputs import Problem

from vllm_bamba.config import NO_TIME_STEP_LIMIT
from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill, causal_conv1d_step
from vllm_bamba.ops.causal_conv1d.reference import causal_conv1d_reference
from vllm_bamba.ops.gated_norm import gated_rms_norm
from vllm_bamba.ops.gated_norm.reference import gated_rms_norm_reference
from vllm_bamba.ops.ssd_prefill import ssd_prefill
from vllm_bamba.ops.ssd_prefill.reference import ssd_prefill_reference
from vllm_bamba.ops.ssm_step import ssm_step
from vllm_bamba.ops.ssm_step.reference import ssm_step_reference

OURS, VLLM, MAMBA_SSM = "vllm_bamba", "vllm", "mamba_ssm"
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        calls: implementation -> what to time.
        reference: the same problem in plain torch, in the dtype that it is given; returns y.
        bytes_moved: every input once, every output once, the state as often as it must be.
        operations: multiplications and additions that no algorithm avoids.
    """

    calls: dict[str, Call]
    reference: Callable[[torch.dtype], torch.Tensor]
    bytes_moved: int
    operations: int


def installed(module: str) -> bool:
    """Whether mamba-ssm or causal-conv1d can run here: both need a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec(module) is not None


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _conv_weights(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return p.normal(p.shape.conv_channels, p.shape.conv_width), p.normal(p.shape.conv_channels)


def conv_prefill(p: Problem) -> Case:
    channels, history = p.shape.conv_channels, p.shape.conv_width - 1
    plan, (weight, bias) = p.prefill_plan(), _conv_weights(p)
    x, state = p.normal(p.tokens, channels), torch.zeros(2, history, channels, dtype=p.dtype, device=p.device)
    state = state.transpose(1, 2)
    calls: dict[str, Call] = {
        OURS: lambda: causal_conv1d_prefill(x, weight, bias, state, plan),
        VLLM: lambda: _vllm_conv_prefill(x, weight, bias, state, plan),
    }
    if installed("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        calls[MAMBA_SSM] = lambda: causal_conv1d_fn(x.T[None], weight, bias, activation="silu")[0].T
    before = torch.zeros(channels, history, device=p.device)
    return Case(
        calls,
        lambda to: causal_conv1d_reference(x.to(to), weight.to(to), bias.to(to), before.to(to))[0],
        2 * _size(x) + _size(weight, bias, state[1]),
        2 * p.tokens * channels * p.shape.conv_width,
    )


def _vllm_conv_prefill(x, weight, bias, state, plan):  # type: ignore[no-untyped-def]
    if x.is_cuda:
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn as convolve
    else:
        from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu as convolve
    where = {"cache_indices": plan.slots, "has_initial_state": plan.continues, "query_start_loc": plan.query_start_loc}
    return convolve(x.T, weight, bias, conv_states=state, activation="silu", metadata=plan.conv_metadata, **where).T


def conv_step(p: Problem) -> Case:
    channels, history = p.shape.conv_channels, p.shape.conv_width - 1
    plan, (weight, bias) = p.decode_plan(), _conv_weights(p)
    x, state = p.normal(p.tokens, channels), p.normal(p.tokens + 1, history, channels).transpose(1, 2)
    inputs = (x.clone(), state.clone())  # both are overwritten
    slots = plan.slots[:, 0]

    def reference(to: torch.dtype) -> torch.Tensor:
        before = inputs[1][slots.long()].to(to)
        rows = zip(inputs[0].to(to), before, strict=True)
        return torch.cat([causal_conv1d_reference(row[None], weight.to(to), bias.to(to), b)[0] for row, b in rows])

    calls: dict[str, Call] = {
        OURS: lambda: causal_conv1d_step(x, weight, bias, state, plan),
        VLLM: lambda: _vllm_conv_step(x, weight, bias, state, slots),
    }
    if installed("causal_conv1d"):
        from causal_conv1d import causal_conv1d_update

        calls[MAMBA_SSM] = lambda: causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=slots)
    moved = 2 * _size(x) + _size(weight, bias) + 2 * _size(state[1:])
    return Case(calls, reference, moved, 2 * p.tokens * channels * p.shape.conv_width)


def _vllm_conv_step(x, weight, bias, state, slots):  # type: ignore[no-untyped-def]
    if x.is_cuda:
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as convolve
    else:
        from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_update_cpu as convolve
    return convolve(x, state, weight, bias, "silu", conv_state_indices=slots)


def prefill(p: Problem) -> Case:
    from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

    plan, inputs = p.prefill_plan(), p.recurrence()
    x, dt, A, B, C, D, dt_bias = inputs
    state = torch.zeros(2, *p.heads, p.shape.mamba_state, dtype=p.state_dtype, device=p.device)
    out = torch.empty_like(x)

    def ours() -> torch.Tensor:
        ssd_prefill(x, dt, A, B, C, D, dt_bias, NO_TIME_STEP_LIMIT, state, plan, out)
        return out

    def vllms() -> torch.Tensor:
        state[plan.slots] = mamba_chunk_scan_combined_varlen(
            *(x, dt, A, B, C, plan.chunk_size, plan.query_start_loc, plan.chunk_start_loc, plan.last_chunk),
            *(plan.chunk_sequence, out),
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            state_dtype=p.state_dtype,
        )
        return out

    calls: dict[str, Call] = {OURS: ours, VLLM: vllms}
    if installed("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        batched = [t[None] for t in (x, dt, B, C)]

        def original() -> torch.Tensor:
            options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "return_final_states": True}
            y, last = mamba_chunk_scan_combined(*batched[:2], A, *batched[2:], plan.chunk_size, **options)
            state[1] = last[0]
            return y[0]

        calls[MAMBA_SSM] = original

    def reference(to: torch.dtype) -> torch.Tensor:
        x, dt, A, B, C, D, dt_bias = (t.to(to) for t in inputs)
        start = torch.zeros(*p.heads, p.shape.mamba_state, dtype=to, device=p.device)
        return ssd_prefill_reference(x, dt, A, B, C, D, dt_bias, NO_TIME_STEP_LIMIT, start)[0]

    work = 4 * p.tokens * p.shape.mamba_intermediate * p.shape.mamba_state  # each token written to and read from h
    return Case(calls, reference, 2 * _size(x) + _size(dt, A, B, C, D, dt_bias, state[1]), work)


def step(p: Problem) -> Case:
    plan, inputs = p.decode_plan(), p.recurrence()
    x, dt, A, B, C, D, dt_bias = inputs
    state = p.normal(p.tokens + 1, *p.heads, p.shape.mamba_state, dtype=p.state_dtype)
    before, out, slots = state[plan.slots[:, 0].long()].clone(), torch.empty_like(x), plan.slots[:, 0]
    wide = p.heads
    expanded = (dt[..., None].expand(-1, *wide), A[:, None, None].expand(*wide, p.shape.mamba_state))
    D_wide, bias_wide = (t[:, None].expand(wide) for t in (D, dt_bias))
    start_gpu_backend(p)

    def ours() -> torch.Tensor:
        ssm_step(x, dt, A, B, C, D, dt_bias, NO_TIME_STEP_LIMIT, state, plan, out)
        return out

    def vllms() -> torch.Tensor:
        if x.is_cuda:
            from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update as update
        else:
            from vllm.model_executor.layers.mamba.ops.cpu.mamba_ssm import selective_state_update as update
        where = {"state_batch_indices": plan.slots, "dst_state_batch_indices": plan.slots, "out": out}
        update(state, x, *expanded, B, C, D_wide, dt_bias=bias_wide, dt_softplus=True, **where)
        return out

    calls: dict[str, Call] = {OURS: ours, VLLM: vllms}
    if installed("mamba_ssm"):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update as original

        options = {"dt_bias": bias_wide, "dt_softplus": True, "state_batch_indices": slots}
        calls[MAMBA_SSM] = lambda: original(state, x, *expanded, B, C, D_wide, **options)

    def reference(to: torch.dtype) -> torch.Tensor:
        x, dt, A, B, C, D, dt_bias = (t.to(to) for t in inputs)
        return ssm_step_reference(x, dt, A, B, C, D, dt_bias, NO_TIME_STEP_LIMIT, before.to(to))[0]

    moved = 2 * _size(x) + _size(dt, A, B, C, D, dt_bias) + 2 * _size(state[1:])
    return Case(calls, reference, moved, 5 * state[1:].numel())


def start_gpu_backend(p: Problem) -> None:
    """Outside an engine, choose vLLM's Triton kernel for the state update as the engine would."""
    if p.device == "cpu":
        return
    from vllm.config.mamba import MambaConfig
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.v1.kv_cache_interface import MambaSpec

    state = MambaSpec(block_size=16, shapes=((1,),), dtypes=(p.state_dtype,))
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=state)])
    initialize_mamba_ssu_backend(MambaConfig(), groups)


def norm(p: Problem) -> Case:
    from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated
    from vllm.model_executor.layers.mamba.ops.layernorm_gated import rms_norm_gated

    channels, eps = p.shape.mamba_intermediate, p.shape.rms_norm_eps
    x, gate, weight = p.normal(p.tokens, channels), p.normal(p.tokens, channels), p.normal(channels)
    fused = torch.compile(gated_rms_norm) if x.is_cuda else gated_rms_norm  # as inside vLLM's compiled graph
    plain = SimpleNamespace(use_rms_norm=True, n_groups=1, tp_size=1, variance_epsilon=eps, weight=weight)

    def vllms() -> torch.Tensor:
        if x.is_cuda:
            return rms_norm_gated(x, weight, bias=None, z=gate, eps=eps, norm_before_gate=False)
        return Mixer2RMSNormGated.forward_native(plain, x, gate)

    calls: dict[str, Call] = {OURS: lambda: fused(x, gate, weight, eps, channels, lambda sums: sums), VLLM: vllms}
    if installed("mamba_ssm"):
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        calls[MAMBA_SSM] = lambda: rmsnorm_fn(x, weight, None, z=gate, eps=eps, norm_before_gate=False)
    reference = lambda to: gated_rms_norm_reference(x.to(to), gate.to(to), weight.to(to), eps)  # noqa: E731
    return Case(calls, reference, 3 * _size(x) + _size(weight), 8 * x.numel())


CASES: dict[str, tuple[str, str, Callable[[Problem], Case]]] = {  # name -> operator, phase, how to build it
    "causal_conv1d_prefill": ("causal_conv1d", "prefill", conv_prefill),
    "causal_conv1d_step": ("causal_conv1d", "decode", conv_step),
    "ssd_prefill": ("ssd_prefill", "prefill", prefill),
    "ssm_step": ("ssm_step", "decode", step),
    "gated_norm_prefill": ("gated_norm", "prefill", norm),
    "gated_norm_step": ("gated_norm", "decode", norm),
}
