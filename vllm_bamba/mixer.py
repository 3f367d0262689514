"""The Mamba-2 mixer over vLLM's state manager: project, mix, gate, project."""

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from vllm_bamba.compat import align_blocks, mix_opaquely, replace_spec, state_backend
from vllm_bamba.config import BambaShape
from vllm_bamba.mixing import FusedMixing, Mixing, OperatorMixing
from vllm_bamba.ops.gated_norm import Division, gated_rms_norm
from vllm_bamba.prefill_graphs import GroupPrefills, PrefillGraphs
from vllm_bamba.prefix.options import state_spec
from vllm_bamba.sharding import MixerShard, scaled
from vllm_bamba.state import mixer_shard, plan_batch
from vllm_bamba.step_options import StepOptions, slot_dtypes, slot_format, slot_shapes
from vllm_bamba.stream import Stream


def sharded_parameter(
    size: tuple[int, ...],
    rows: list[range],
    dtype: torch.dtype | None = None,
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda loaded: loaded,
) -> nn.Parameter:
    """A parameter that loads `rows` of the checkpoint's tensor, converted."""
    parameter = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)

    def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
        part = convert(torch.cat([loaded[r.start : r.stop] for r in rows]))
        if part.shape != param.shape:
            raise ValueError(f"this rank's part of it has shape {tuple(part.shape)}, expected {tuple(size)}")
        param.data.copy_(part)

    parameter.weight_loader = load  # type: ignore[attr-defined]  # where vLLM's loaders look for it
    return parameter


class InProjectionLinear(MergedColumnParallelLinear):
    """hidden -> gate | x | B | C | dt, where B and C may be held by several ranks.

    vLLM's merged column-parallel layer deals out each of the five evenly; the copies of B and C are made on the way
    in, by repeating the checkpoint's rows, so that weights, biases, quantisation scales and LoRA factors all take the
    same road. The class's name says Linear because compressed-tensors looks there for what a checkpoint quantises.
    """

    def __init__(self, hidden_size: int, shard: MixerShard, bias: bool, quant_config: object, prefix: str):
        self.shard = shard
        super().__init__(hidden_size, shard.in_proj_sizes, bias=bias, quant_config=quant_config, prefix=prefix)

    def with_copies(self, loaded: torch.Tensor, dim: int) -> torch.Tensor:
        """Repeat the rows of B and C as often as ranks hold them.

        Args:
            loaded: a checkpoint tensor whose dimension `dim` runs over in_proj's rows, or over blocks of them.
            dim: that dimension.
        """
        sources = self.shard.in_proj_sources
        factor, rest = divmod(sources[-1].stop, loaded.shape[dim])
        if rest or not factor:
            raise ValueError(f"in_proj has {sources[-1].stop} rows, which {loaded.shape[dim]} do not stand for")
        rows = scaled(sources, factor)
        return torch.cat([loaded.narrow(dim, r.start, len(r)) for r in rows], dim)

    def _copied(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object) -> torch.Tensor:
        dim = getattr(param, "output_dim", None)
        if shard_id is not None or dim is None or loaded.dim() == 0 or loaded.numel() == 1 or self.shard.copies == 1:
            return loaded
        return self.with_copies(loaded, dim)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):  # type: ignore[no-untyped-def]
        super().weight_loader(param, self._copied(param, loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None):  # type: ignore[no-untyped-def]
        super().weight_loader_v2(param, self._copied(param, loaded_weight, loaded_shard_id), loaded_shard_id)


class CausalConv1d(nn.Module):
    """Weights of the depthwise convolution over this rank's channels of x | B | C."""

    def __init__(self, shard: MixerShard, width: int, bias: bool):
        super().__init__()
        channels = shard.local_conv_channels
        self.weight = sharded_parameter((channels, width), shard.conv_rows, convert=lambda w: w.squeeze(1))
        self.bias = sharded_parameter((channels,), shard.conv_rows) if bias else None


class GatedRMSNorm(nn.Module):
    """RMSNorm of y * silu(gate) over all ranks' channels."""

    def __init__(self, shard: MixerShard, eps: float):
        super().__init__()
        self.weight = sharded_parameter((shard.local_intermediate,), [shard.intermediate_rows])
        self.eps = eps
        self.channels = shard.heads * shard.head_dim

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps, self.channels, tensor_model_parallel_all_reduce)

    def division(self, sums: torch.Tensor) -> Division:
        """What is left to be done where all but the norm's division is; `sums` is [tokens, any]."""
        return Division(sums, self.channels, self.eps)


class BambaMixer(nn.Module, MambaBase):
    """One Mamba-2 layer's mixer; its state lives in vLLM's cache, one slot a sequence."""

    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.shape = shape
        self.prefix = prefix
        self.model_config = vllm_config.model_config
        shard = mixer_shard(shape, get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank())
        self.shard = shard

        self.in_proj = InProjectionLinear(
            shape.hidden_size, shard, shape.mamba_proj_bias, vllm_config.quant_config, f"{prefix}.in_proj"
        )
        self.conv1d = CausalConv1d(shard, shape.conv_width, shape.mamba_conv_bias)
        heads, head_rows = (shard.local_heads,), [shard.head_rows]
        self.A = sharded_parameter(heads, head_rows, torch.float32, convert=lambda log: -log.float().exp())
        self.D = sharded_parameter(heads, head_rows)
        self.dt_bias = sharded_parameter(heads, head_rows)
        self.norm = GatedRMSNorm(shard, shape.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            shape.mamba_intermediate,
            shape.hidden_size,
            bias=shape.mamba_proj_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.out_proj",
        )

        self.slot_shapes, self.slot_dtypes = slot_shapes(vllm_config, shape), slot_dtypes(vllm_config, shape)
        form = slot_format(vllm_config, shape)
        quantised = vllm_config.quant_config is not None
        self.mixing: Mixing = OperatorMixing(self) if form is None else FusedMixing(self, form, quantised)

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name: {prefix}")
        layers[prefix] = self
        self.kv_cache = (torch.tensor([]), torch.tensor([]))
        self.backend = state_backend(shape.head_dim, self.model_config.dtype, vllm_config.cache_config.cache_dtype)
        self.wants_graphs = StepOptions.of(vllm_config, shape).prefill_graphs
        self.graphs = PrefillGraphs(self.mixing.prefill)
        self.short: GroupPrefills | None = None  # the metadata's builder sets it where prefills may be graphs

    def forward(self, stream: Stream, norm: RMSNorm) -> Stream:
        """Add this layer to the stream, for a part behind `norm`."""
        projected = stream.into(self.in_proj)
        channels = self.shard.local_intermediate
        mixed = projected.new_empty(len(projected), channels + self.mixing.sums)
        mix_opaquely(projected, mixed, self.prefix)
        if self.mixing.divides_later:
            division = self.norm.division(mixed[:, channels:])
            return stream.plus(mixed[:, :channels], self.out_proj, norm, division)
        return stream.plus(self.norm(mixed, projected[:, :channels]), self.out_proj, norm)

    def conv_ssm_forward(self, projected_states: torch.Tensor, output: torch.Tensor) -> None:
        """Convolution and recurrence of x, B, C and dt, [tokens, in_proj rows], into output [tokens, channels + sums].

        Called by `mix_opaquely`, which fixes the names. Decode tokens come first, then prefill tokens, then, in a
        padded batch, rows of no token.
        """
        context = get_forward_context()
        batch, captured = context.attn_metadata, False
        if self.short is not None and context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            captured = self.graphs.capture(projected_states, output, self.short, self.kv_cache[1])
        metadata = batch.get(self.prefix) if batch is not None else None
        if metadata is None:  # vLLM's memory profiling: no states yet
            self.mixing.warm_up(projected_states)
            if not self.kv_cache[0].numel():
                self.mixing.reserve(output.device)
            output.zero_()
            return
        decode, prefill = plan_batch(metadata)
        end = 0
        if decode is not None:
            end = decode.num_tokens
            self.mixing.decode(projected_states[:end], decode, output[:end])
        if prefill is not None:
            rows = slice(end, end + prefill.num_tokens)
            end = rows.stop
            projected, mixed = projected_states[rows], output[rows]
            short = None if captured else metadata.short  # what describes them was used to make graphs
            if short is None or not self.graphs.run(projected, metadata.num_prefills, short, self.kv_cache[1], mixed):
                self.mixing.prefill(projected, prefill, mixed)
        output[end:].zero_()  # padding: a NaN there would reach all rows through a dynamic fp8 scale

    # what vLLM's state manager asks

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.MAMBA2

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        if self.shape.attention_layers:
            align_blocks(vllm_config, self.backend)
        spec = super().get_kv_cache_spec(vllm_config)
        if isinstance(self.mixing, FusedMixing):  # which takes drafts back inside of a slot
            spec = replace_spec(MambaSpec, spec, num_speculative_blocks=0)
        return state_spec(spec, vllm_config)

    @property
    def kv_cache(self) -> tuple[torch.Tensor, ...]:
        """The state tensors, which vLLM binds."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, states: tuple[torch.Tensor, ...]) -> None:
        self._kv_cache = states
        self.mixing.forget_cache()

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.slot_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self.slot_dtypes
