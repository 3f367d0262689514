"""The operators as `bench_ops.py` times them: one problem each, solved by every implementation that is installed.

An implementation is a function without arguments that does the work in place and returns y. All of them share the
inputs and the state slots of their case.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
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
from vllm_bamba.state import SlotFormat, mixer_shard

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
        rounding: error, as a share of the largest y, of storing states in less than the problem's precision.
    """

    calls: dict[str, Call]
    reference: Callable[[torch.dtype], torch.Tensor]
    bytes_moved: int
    operations: int
    rounding: float = 0.0


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


def fused_step(p: Problem, int8: bool = False, warps: Mapping[str, int] | None = None) -> Case:
    """The whole step between a mixer's projections; vLLM's is its convolution and its state update.

    Rings are as they are on average. `warps` of a head's program are by name; without them those that are tuned.
    """
    from vllm_bamba.ops.mixer_step import StepWeights, mixer_step
    from vllm_bamba.ops.mixer_step.reference import mixer_step_reference
    from vllm_bamba.ops.mixer_step.tuning import warps_for

    (heads, head_dim), (groups, width), taps = p.heads, p.groups, p.shape.conv_width
    inner, replay = heads * head_dim, 16
    plan, (weight, bias), (_, dt, A, _, _, D, dt_bias) = p.decode_plan(), _conv_weights(p), p.recurrence()
    projected = torch.cat([p.normal(p.tokens, 2 * inner + 2 * groups * width), dt], 1)
    form = SlotFormat(mixer_shard(p.shape, 1), taps, p.dtype, torch.int8 if int8 else p.state_dtype, replay)
    slots, used = form.empty(p.tokens + 1, p.device), plan.slots[:, 0].long()
    for tensor in slots.tensors:
        if tensor is not None:
            tensor.copy_(p.normal(*tensor.shape, dtype=torch.float32) * (40 if tensor is slots.ssm and int8 else 1))
    assert slots.ring_x is not None
    assert slots.ring_b is not None
    assert slots.ring_dt is not None
    # as a step finds them: of `replay` heads one has a full ring, the next one a token less, and so on
    before = plan.lengths[:, None].long() - 2  # the newest token's position
    ages = (before - torch.arange(replay, device=p.device)) % replay + 1  # of each entry
    filled = (before + torch.arange(heads, device=p.device)) % replay + 1  # entries of each head
    slots.ring_dt.abs_().mul_(0.05)
    slots.ring_dt[used] *= ages[:, None] <= filled[:, :, None]
    warps = warps or {OURS: warps_for(slots, p.dtype)}
    out = torch.empty(p.tokens, inner, dtype=p.dtype, device=p.device)

    # the same slots as vLLM keeps them: inputs of the convolution oldest first, the state with the ring's tokens in it
    past = plan.lengths[:, None].long() - 1 - torch.arange(1, max(replay + 1, taps), device=p.device)  # newest first
    inputs = slots.conv[used[:, None], past[:, : taps - 1].flip(1) % taps].transpose(1, 2)  # [rows, channels, taps - 1]
    times = slots.ring_dt[used[:, None], :, past[:, :replay] % replay].double()  # [rows, tokens, heads]
    after = times.cumsum(1) - times
    x = slots.ring_x[used[:, None], :, past[:, :replay] % replay].double()
    B = slots.ring_b[used[:, None], past[:, :replay] % replay].double().unflatten(-1, (groups, width))
    state = slots.ssm[used].double() * (1 if slots.scale is None else slots.scale[used].double()[..., None])
    state *= (A * times.sum(1))[..., None, None].exp()
    written = (times * (A * after).exp())[..., None] * x
    state += torch.einsum("rthp,rthn->rhpn", written, B.repeat_interleave(heads // groups, 2))

    conv_state = torch.zeros(p.tokens + 1, taps - 1, inputs.shape[1], dtype=p.dtype, device=p.device).transpose(1, 2)
    conv_state[used] = inputs
    ssm_state = torch.zeros(p.tokens + 1, *state.shape[1:], dtype=p.state_dtype, device=p.device)
    ssm_state[used] = state.to(p.state_dtype)
    weights, given = StepWeights(weight.T.contiguous(), bias, A, D, dt_bias, None), projected.clone()
    start_gpu_backend(p)

    def ours(num_warps: int) -> torch.Tensor:
        mixer_step(given, weights, NO_TIME_STEP_LIMIT, slots, plan, out, num_warps)
        return out

    def vllms() -> torch.Tensor:
        _, xbc, dt = projected.split([inner, inner + 2 * groups * width, heads], 1)
        x, B, C = causal_conv1d_step(xbc, weight, bias, conv_state, plan).split([inner, *[groups * width] * 2], 1)
        x, B, C = x.unflatten(1, p.heads), B.unflatten(1, p.groups), C.unflatten(1, p.groups)
        ssm_step(x, dt, A, B, C, D, dt_bias, NO_TIME_STEP_LIMIT, ssm_state, plan, out.view_as(x))
        return out

    def reference(to: torch.dtype) -> torch.Tensor:
        taps, offsets, rates, skips, biases = (t.to(to) for t in (weight, bias, A, D, dt_bias))
        fixed = (taps, offsets, rates, skips, biases, NO_TIME_STEP_LIMIT)
        rows = zip(given.to(to), inputs.to(to), state.to(to), strict=True)
        return torch.stack([mixer_step_reference(row, *fixed, i, h, groups)[0] for row, i, h in rows])

    scale = 0 if slots.scale is None else _size(slots.scale[1:])
    kept = _size(slots.ssm[1:]) * (replay + 1) // replay + scale + _size(slots.ring_x[1:], slots.ring_b[1:]) // 2
    moved = _size(projected, out, weight, bias, A, D, dt_bias) + kept + 2 * _size(slots.conv[1:])
    calls: dict[str, Call] = {name: functools.partial(ours, number) for name, number in warps.items()}
    rounding = 1 / 127 if int8 else 0.0  # one step of a row: rings that are full are folded in front of the step
    return Case(calls | {VLLM: vllms}, reference, moved, 3 * state.numel(), rounding)


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
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    CASES["mixer_step"] = ("mixer_step", "decode", fused_step)
    CASES["mixer_step_int8"] = ("mixer_step", "decode", functools.partial(fused_step, int8=True))
