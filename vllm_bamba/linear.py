"""Linear layers whose decode steps of few rows go through `ops/skinny_linear`."""

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

LIBRARY = torch.library.Library("vllm_bamba", "FRAGMENT")


def skinny_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from vllm_bamba.ops import skinny_linear as op  # needs Triton

    return op.skinny_linear(x, weight)


def _like_result(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# hidden from torch.compile, so that every number of rows has its launch
direct_register_custom_op("skinny_linear", skinny_linear, fake_impl=_like_result, target_lib=LIBRARY)


class SkinnyProducts:
    """Beside one of vLLM's methods for weights that are not quantised."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Also have the kernels made that will serve this layer."""
        from vllm_bamba.ops.skinny_linear import warm_up

        super().process_weights_after_loading(layer)  # type: ignore[misc]
        warm_up(layer.weight)  # type: ignore[arg-type]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = torch.ops.vllm_bamba.skinny_linear(x, layer.weight)
        return output if bias is None else output + bias


class SkinnyLinearMethod(SkinnyProducts, UnquantizedLinearMethod):
    """Of linear layers."""


class SkinnyLMHeadMethod(SkinnyProducts, UnquantizedEmbeddingMethod):
    """Of the language model's head."""


def use_skinny_products(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Have `model`'s linear layers multiply few rows in our kernel, where they are in bf16 and not quantised.

    Does nothing where the user asked for another way: batch-invariant kernels or a linear backend.
    """
    if (
        not current_platform.is_cuda()
        or envs.VLLM_BATCH_INVARIANT
        or vllm_config.kernel_config.linear_backend != "auto"
        or vllm_config.model_config.dtype != torch.bfloat16
    ):
        return
    for layer in model.modules():
        method = type(getattr(layer, "quant_method", None))
        if isinstance(layer, LinearBase) and method is UnquantizedLinearMethod:
            layer.quant_method = SkinnyLinearMethod()
        elif isinstance(layer, ParallelLMHead) and method is UnquantizedEmbeddingMethod:
            layer.quant_method = SkinnyLMHeadMethod()
