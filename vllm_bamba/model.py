"""Bamba for vLLM: 29 Mamba-2 layers, 3 attention layers and an MLP in each, in the released 9.8B models.

Module paths are the checkpoint's own, so that quantisation ignore lists and LoRA adapters find what they name.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_bamba.compat import (
    MambaStateCopyFuncCalculator,
    keep_compiled_kernels,
    moves_layers,
    prepare_lora,
    sampler_warm_ups,
    tell_mixers_parts_apart,
)
from vllm_bamba.config import BambaShape
from vllm_bamba.mixer import BambaMixer
from vllm_bamba.prefix.options import attention_spec
from vllm_bamba.step_options import StepOptions, slot_dtypes, slot_shapes
from vllm_bamba.stream import Stream, stream_for
from vllm_bamba.warm_up import WarmUps, warm_ups
from vllm_bamba.weights import STACKED, load_weights


class BambaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            shape.hidden_size,
            [shape.intermediate_size] * 2,
            bias=shape.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            shape.intermediate_size,
            shape.hidden_size,
            bias=shape.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act = SiluAndMul()

    def forward(self, stream: Stream, norm: RMSNorm | None) -> Stream:
        """Add this layer to the stream, for a part behind `norm`."""
        return stream.plus(stream.into_gated(self.gate_up_proj, self.act), self.down_proj, norm)


class SharedAttention(Attention):
    """vLLM's attention, whose cache other requests can continue at any unit of tokens."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return attention_spec(super().get_kv_cache_spec(vllm_config), vllm_config)


class BambaAttention(nn.Module):
    """Grouped-query attention over vLLM's paged cache; the first `rotary_dim` channels of each head are rotated."""

    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads = shape.num_attention_heads // ranks
        self.num_kv_heads = max(1, shape.num_key_value_heads // ranks)
        self.head_dim = shape.head_dim
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            bias=shape.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.num_attention_heads * shape.head_dim,
            shape.hidden_size,
            bias=shape.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            shape.head_dim,
            max_position=shape.max_position_embeddings,
            # not the fraction, from which vLLM would get 28 of 30 channels back where a head has 55
            rope_parameters=shape.rope_parameters | {"rope_dim": shape.rotary_dim},
            is_neox_style=True,
        )
        self.attn = SharedAttention(
            self.num_heads,
            shape.head_dim,
            shape.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, stream: Stream, norm: RMSNorm) -> Stream:
        """Add this layer to the stream, for a part behind `norm`."""
        qkv = stream.into(self.qkv_proj)
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([queries, keys, keys], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return stream.plus(self.attn(q, k, v), self.o_proj, norm)


class BambaDecoderLayer(nn.Module):
    """Mixer or attention, then an MLP, each behind a norm of its own."""

    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.feed_forward = BambaMLP(shape, vllm_config, f"{prefix}.feed_forward")
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def mix(self, positions: torch.Tensor, stream: Stream, norm: RMSNorm) -> Stream:
        """The part of the layer in which tokens see each other: mixer or attention."""
        raise NotImplementedError

    def add_to(self, positions: torch.Tensor, stream: Stream, next_norm: RMSNorm | None) -> Stream:
        """Add this layer to a stream that was made for its first norm, for a layer behind `next_norm`."""
        return self.feed_forward(self.mix(positions, stream, self.pre_ff_layernorm), next_norm)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """This layer on its own, [tokens, hidden] -> [tokens, hidden]."""
        return self.add_to(positions, Stream.start(hidden_states, self.input_layernorm), None).residual


class BambaMambaLayer(BambaDecoderLayer):
    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__(shape, vllm_config, prefix)
        self.mamba = BambaMixer(shape, vllm_config, f"{prefix}.mamba")

    def mix(self, positions: torch.Tensor, stream: Stream, norm: RMSNorm) -> Stream:
        return self.mamba(stream, norm)


class BambaAttentionLayer(BambaDecoderLayer):
    def __init__(self, shape: BambaShape, vllm_config: VllmConfig, prefix: str):
        super().__init__(shape, vllm_config, prefix)
        self.self_attn = BambaAttention(shape, vllm_config, f"{prefix}.self_attn")

    def mix(self, positions: torch.Tensor, stream: Stream, norm: RMSNorm) -> Stream:
        return self.self_attn(positions, stream, norm)


@support_torch_compile
class BambaModel(nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        shape = BambaShape.from_hf(vllm_config.model_config.hf_config)
        stage = get_pp_group()
        if stage.is_first_rank or (shape.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                shape.vocab_size,
                shape.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "embed_tokens"),
            )
        else:
            self.embed_tokens = PPMissingLayer()

        def layer(prefix: str) -> BambaDecoderLayer:
            index = int(prefix.rsplit(".", 1)[1])
            kind = BambaAttentionLayer if index in shape.attention_layers else BambaMambaLayer
            return kind(shape, vllm_config, prefix)

        self.start_layer, self.end_layer, self.layers = make_layers(
            shape.num_layers, layer, prefix=maybe_prefix(prefix, "layers")
        )
        self.final_layernorm = (
            RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps) if stage.is_last_rank else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], shape.hidden_size
        )
        self.stream: type[Stream] = Stream
        self.one_by_one = moves_layers()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        layers = self.layers[self.start_layer : self.end_layer]
        if self.one_by_one:
            for layer in layers:
                hidden_states = layer(positions, hidden_states)
        else:
            norms = [layer.input_layernorm for layer in layers]
            stream = self.stream.start(hidden_states, norms[0])
            for layer, next_norm in zip(layers, [*norms[1:], None], strict=True):
                stream = layer.add_to(positions, stream, next_norm)
            hidden_states = stream.residual
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.final_layernorm(hidden_states)


class BambaForCausalLM(
    nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsPP, SupportsQuant, SupportsMambaPrefixCaching
):
    """The language model that vLLM instantiates."""

    packed_modules_mapping = {  # noqa: RUF012  vLLM's interface: fused module -> the checkpoint's, in order
        fused: [name for name, (into, _) in STACKED.items() if into == fused] for fused in ("qkv_proj", "gate_up_proj")
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        keep_compiled_kernels()
        tell_mixers_parts_apart(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.shape = BambaShape.from_hf(self.config)
        # whether each parameter has got its weights once, if only random ones: later loads may then bring a part
        self.complete = vllm_config.load_config.load_format == "dummy"
        if vllm_config.lora_config is not None:
            from vllm_bamba.lora import InProjectionWithLoRA

            prepare_lora(InProjectionWithLoRA)
        self.model = BambaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.shape.vocab_size,
                self.shape.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if self.shape.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(self.shape.vocab_size)
        self.sampler_warm_ups = WarmUps()
        samples = get_pp_group().is_last_rank and vllm_config.model_config.runner_type == "generate"
        if samples and current_platform.is_cuda():
            device = torch.device("cuda", torch.cuda.current_device())
            self.sampler_warm_ups.start("sampler", lambda: sampler_warm_ups(self.shape.vocab_size, device), device)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if StepOptions.of(vllm_config, self.shape).fused:
            from vllm_bamba.linear import use_skinny_products

            use_skinny_products(self, vllm_config)
            self.model.stream = stream_for(self.model.layers, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        warm_ups.finish()  # what vLLM's first run, its memory profile, has started; nothing is left in later ones
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        self.sampler_warm_ups.finish()
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load_weights(self, self.shape, weights, partial=self.complete)
        self.complete = True
        return loaded

    # what vLLM's state manager asks before there is a model

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return slot_shapes(vllm_config, BambaShape.from_hf(vllm_config.model_config.hf_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return slot_dtypes(vllm_config, BambaShape.from_hf(vllm_config.model_config.hf_config))

    @classmethod
    def get_mamba_state_copy_func(cls):  # type: ignore[no-untyped-def]
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    # what Model Runner V2 asks

    @staticmethod
    def get_model_state_cls():  # type: ignore[no-untyped-def]
        from vllm_bamba.model_state import BambaModelState  # needs Model Runner V2's modules, which V1 does not

        return BambaModelState
