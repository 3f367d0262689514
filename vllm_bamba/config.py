"""What a Bamba checkpoint says about itself, read once from its config and checked.

`BambaShape` is the only reader of the Hugging Face config: every other module takes its fields from here.
`BambaServingConfig` is vLLM's hook that checks a configuration before any weight is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_bamba.sharding import check_tensor_parallel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NO_TIME_STEP_LIMIT = (0.0, math.inf)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class BambaShape:
    """Sizes and switches of one Bamba model; `from_hf` says which of the config's fields each one is.

    Attributes:
        attention_layers: indices of the layers that have attention; the others have a Mamba-2 mixer.
        rotary_dim: channels of each attention head that are rotated.
        mamba_state: width of the SSM state, N in arXiv:2405.21060.
        conv_width: taps of the causal convolution.
        chunk_size: tokens of an SSD chunk.
        time_step_limit: bounds of the time step after softplus.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_layers: frozenset[int]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    rms_norm_eps: float
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int
    mamba_state: int
    conv_width: int
    chunk_size: int
    time_step_limit: tuple[float, float]
    attention_bias: bool
    mlp_bias: bool
    mamba_proj_bias: bool
    mamba_conv_bias: bool
    tie_word_embeddings: bool

    @property
    def mamba_intermediate(self) -> int:
        """Channels of x, and of the gate: heads x head_dim."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that the causal convolution sees: x, B and C."""
        return self.mamba_intermediate + 2 * self.mamba_groups * self.mamba_state

    @classmethod
    def from_hf(cls, config: Any) -> BambaShape:
        """Read and check a Transformers `BambaConfig`.

        Raises:
            ValueError: a field is missing, contradicts another or asks for something that is not supported; the
                message names the field.
        """
        model_type = getattr(config, "model_type", None)
        if model_type != "bamba":
            raise ValueError(
                f"model_type is {model_type!r}: vllm_bamba serves Bamba checkpoints only (model_type 'bamba'). "
                "Correct `architectures` or `model_type` in the checkpoint's config.json."
            )
        heads = _positive(config, "num_attention_heads")
        hidden_size = _positive(config, "hidden_size")
        head_dim = getattr(config, "head_dim", None) or _divide(
            hidden_size, "hidden_size", heads, "num_attention_heads"
        )
        rope_parameters = dict(config.rope_parameters or {})
        shape = cls(
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            attention_layers=frozenset(config.attn_layer_indices or ()),
            num_attention_heads=heads,
            num_key_value_heads=heads
            if config.num_key_value_heads is None
            else _positive(config, "num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=_rotary_dim(config, head_dim, rope_parameters),
            rope_parameters=rope_parameters,
            max_position_embeddings=_positive(config, "max_position_embeddings"),
            rms_norm_eps=config.rms_norm_eps,
            mamba_heads=_positive(config, "mamba_n_heads"),
            mamba_head_dim=_mamba_head_dim(config),
            mamba_groups=_positive(config, "mamba_n_groups"),
            mamba_state=_positive(config, "mamba_d_state"),
            conv_width=_positive(config, "mamba_d_conv"),
            chunk_size=_positive(config, "mamba_chunk_size"),
            time_step_limit=tuple(config.time_step_limit or NO_TIME_STEP_LIMIT),
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            mamba_proj_bias=config.mamba_proj_bias,
            mamba_conv_bias=config.mamba_conv_bias,
            tie_word_embeddings=config.tie_word_embeddings,
        )
        shape._check(config)
        return shape

    def _check(self, config: Any) -> None:
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}: Bamba's MLP and convolution are built with 'silu'.")
        outside = sorted(i for i in self.attention_layers if not 0 <= i < self.num_layers)
        if outside:
            raise ValueError(f"attn_layer_indices names layers {outside} of a model of {self.num_layers} layers.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}."
            )
        if self.mamba_heads % self.mamba_groups:
            raise ValueError(
                f"mamba_n_groups = {self.mamba_groups} does not divide mamba_n_heads = {self.mamba_heads}."
            )
        expanded = _positive(config, "mamba_expand") * self.hidden_size
        if self.mamba_intermediate != expanded:
            raise ValueError(
                f"mamba_n_heads x mamba_d_head = {self.mamba_intermediate} differs from "
                f"mamba_expand x hidden_size = {expanded}."
            )
        if not isinstance(self.rms_norm_eps, float) or self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps = {self.rms_norm_eps!r}: expected a positive number, such as 1e-5.")
        if not 2 <= self.conv_width <= 4:
            raise ValueError(f"mamba_d_conv = {self.conv_width}: convolutions of width 2, 3 and 4 are supported.")
        if self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"mamba_chunk_size = {self.chunk_size} is not a power of two.")
        if len(self.time_step_limit) != 2 or not 0 <= self.time_step_limit[0] < self.time_step_limit[1]:
            raise ValueError(f"time_step_limit = {self.time_step_limit}: expected (low, high), 0 <= low < high.")
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters.rope_type = {rope_type!r}: supported are {', '.join(ROPE_TYPES)}; vLLM and "
                "Transformers differ in others."
            )


def _positive(config: Any, field: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{field} = {value!r} in the checkpoint's config.json: expected a positive integer.")
    return value


def _divide(value: int, name: str, parts: int, parts_name: str) -> int:
    if value % parts:
        raise ValueError(f"{parts_name} = {parts} does not divide {name} = {value}.")
    return value // parts


def _mamba_head_dim(config: Any) -> int:
    """`mamba_d_head`, which may be "auto": mamba_expand x hidden_size / mamba_n_heads."""
    if config.mamba_d_head == "auto":
        inner = _positive(config, "mamba_expand") * config.hidden_size
        return _divide(inner, "mamba_expand x hidden_size", _positive(config, "mamba_n_heads"), "mamba_n_heads")
    return _positive(config, "mamba_d_head")


def _rotary_dim(config: Any, head_dim: int, rope_parameters: dict[str, Any]) -> int:
    """Channels of each head that are rotated: `attn_rotary_emb`, or else Transformers' fraction, a half."""
    field, asked = "attn_rotary_emb", getattr(config, "attn_rotary_emb", None)
    rotary_dim, expected = asked, f"an even number of at most head_dim = {head_dim}"
    if asked is None:
        field, asked = "partial_rotary_factor", rope_parameters.get("partial_rotary_factor", 0.5)
        rotary_dim = int(head_dim * asked) if isinstance(asked, int | float) and 0 < asked <= 1 else 0
        expected = f"a fraction of head_dim = {head_dim} that is an even number"
    if not isinstance(rotary_dim, int) or not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"{field} = {asked!r}: expected {expected}.")
    return rotary_dim


class BambaServingConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture hook: refuse early, in the process that the user started."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check checkpoint, parallelism and options together.

        Raises:
            ValueError: naming the field or flag and what to do about it.
        """
        from vllm_bamba.compat import check_options, choose_state_dtype, keep_strides
        from vllm_bamba.graphs import choose_graphs
        from vllm_bamba.prefix.options import configure
        from vllm_bamba.step_options import check_step
        from vllm_bamba.weights import check_files

        shape = BambaShape.from_hf(vllm_config.model_config.hf_config)
        tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
        check_tensor_parallel(
            tensor_parallel,
            mamba_heads=shape.mamba_heads,
            mamba_groups=shape.mamba_groups,
            attention_heads=shape.num_attention_heads,
            key_value_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
        )
        check_options(vllm_config)
        check_step(vllm_config, shape)
        choose_state_dtype(vllm_config)
        keep_strides(vllm_config)
        choose_graphs(vllm_config, shape)
        attention_layers = len(shape.attention_layers)
        configure(vllm_config, has_attention=attention_layers > 0, has_mamba=attention_layers < shape.num_layers)
        check_files(vllm_config.model_config.model, vllm_config.load_config.load_format)
