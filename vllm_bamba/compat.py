"""Every touch of a vLLM internal that may move: what it is, why it is needed, where it was seen, when it can go.

Imports of vLLM's documented building blocks (`Attention`, the linear layers, `RMSNorm`, `MambaBase`, ...) stand in the
modules that use them; what a model outside vLLM's tree would not normally touch stands here.

Each was seen in 0.32 and 0.33, unless it says otherwise.

`MODELS_CONFIG_MAP` (in `register`)
    Checks before weights are loaded. Goes when vLLM has a public hook.
operator `vllm::mamba_mixer2`
    Opaque to torch.compile and a place where CUDA graphs are cut; calls the layer's `conv_ssm_forward`. Goes when
    plugins can add operators to the list of those places.
`Mamba2AttentionMetadata`
    Slots and chunks of the batch. Goes when the plugin has a metadata builder of its own.
`vllm.model_executor.layers.mamba.ops`
    The operators underneath ours. Goes operator by operator, as each gets a kernel of its own.
`supported_kv_cache_layouts`
    Pipeline stages without attention must agree with the others. Goes when vLLM intersects the workers' lists.
`vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink`
    On CPUs, requests without an adapter got one. Goes with 0.32.
`vllm.lora.utils._all_lora_classes`
    Adapters of `in_proj` where B and C are copied to several ranks. Goes when vLLM asks layers for their wrapper.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.mamba.mamba_mixer2  # noqa: F401  registers vllm::mamba_mixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    is_conv_state_dim_first,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadata
from vllm.v1.attention.selector import get_attn_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "Mamba2AttentionMetadata",
    "MambaStateCopyFuncCalculator",
    "MambaStateDtypeCalculator",
    "check_options",
    "choose_state_dtype",
    "is_conv_state_dim_first",
    "mix_opaquely",
    "prepare_lora",
    "state_backend",
]


def check_options(vllm_config: VllmConfig) -> None:
    """Raise ValueError for vLLM options that this model would otherwise get wrong without a word."""
    if vllm_config.cache_config.use_replayssm:
        raise ValueError("--use-replayssm is a feature of vLLM's own mixer; leave it out for Bamba.")
    if vllm_config.speculative_config is not None and current_platform.is_cpu():
        raise ValueError(
            "speculative decoding of Bamba needs a GPU: vLLM's CPU convolution cannot take rejected tokens back. "
            "Leave --speculative-config out."
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.fully_sharded_loras and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError("--fully-sharded-loras does not work with Bamba's in_proj; leave it out.")


def choose_state_dtype(vllm_config: VllmConfig) -> None:
    """Keep the SSM state in fp32 on CPUs, unless the user chose: vLLM's C++ step cuts bf16 states off towards zero.

    The error of a slow-decay head then grows with every token, where rounding would let it average out. Seen in 0.32;
    goes when the C++ step rounds.
    """
    if current_platform.is_cpu() and vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
        vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"


def mix_opaquely(projected: torch.Tensor, mixed: torch.Tensor, layer_name: str) -> None:
    """Call `conv_ssm_forward(projected_states=projected, output=mixed)` of the layer, hidden from torch.compile.

    vLLM's own operator does just that for whatever layer is registered under the name; it is on vLLM's list of
    operators at which piecewise CUDA graphs are cut, which a plugin cannot extend.
    """
    torch.ops.vllm.mamba_mixer2(projected, mixed, _encode_layer_name(layer_name))


def state_backend(head_dim: int, dtype: torch.dtype, kv_cache_dtype: str | None) -> type[AttentionBackend]:
    """vLLM's Mamba-2 metadata backend, with the KV-cache layouts of the attention backend that serves this model.

    On vLLM 0.32 and 0.33 every worker reports the layouts that its backends support and all lists must be equal. A
    pipeline stage of Mamba layers alone would report every layout and the engine would not start ("Workers disagree
    on supported KV cache layouts"), although one resolved layout suits all of them.
    """
    attention = get_attn_backend(head_dim, dtype, kv_cache_dtype)
    return _state_backend(attention)


@functools.cache
def _state_backend(attention: type[AttentionBackend]) -> type[AttentionBackend]:
    class BambaStateBackend(Mamba2AttentionBackend):
        @classmethod
        def supported_kv_cache_layouts(cls) -> Any:
            return attention.supported_kv_cache_layouts()

    return BambaStateBackend


def prepare_lora(wrapper: type) -> None:
    """Have vLLM try `wrapper` before its own LoRA layers, and keep adapters to their rows; safe to call again."""
    from vllm.lora import utils

    if wrapper not in utils._all_lora_classes:
        utils._all_lora_classes = (wrapper, *utils._all_lora_classes)
    if current_platform.is_cpu():
        _mask_rows_without_adapter()


def _mask_rows_without_adapter() -> None:
    """Keep adapters away from requests that asked for none.

    vLLM 0.32's CPU operators take the index of such a row, -1, for the last adapter, so a request without an adapter
    in a batch with others gets one. Every path to an adapter shrinks the input first, and a row of zeros shrinks to
    zeros. Fixed in 0.33; goes with 0.32.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink
    if hasattr(shrink, "__wrapped__"):
        return

    @functools.wraps(shrink)
    def masked(inputs: Any, weights: Any, output: Any, adapters: Any, scaling: float = 1.0) -> None:
        shrink(inputs * (adapters >= 0)[:, None], weights, output, adapters, scaling)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = masked
