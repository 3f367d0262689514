"""Linear layers whose decode steps of few rows go through `ops/skinny_linear`."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_bamba.step_options import skinny_tuning
from vllm_bamba.warm_up import warm_ups

LIBRARY = torch.library.Library("vllm_bamba", "FRAGMENT")


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from vllm_bamba.ops.skinny_linear import skinny_linear, skinny_warm_ups  # need Triton

    kernels = ("skinny_linear", weight.shape, weight.dtype)
    warm_ups.start(kernels, lambda: skinny_warm_ups(weight), weight.device)
    return skinny_linear(x, weight)


def _like_result(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# hidden from torch.compile, so that every number of rows has its launch
direct_register_custom_op("skinny_linear", _multiply, fake_impl=_like_result, target_lib=LIBRARY)


class SkinnyProducts:
    """In front of one of vLLM's methods for weights that are not quantised."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, K] -> [rows, N]; with a bias, which a library's product adds before it rounds, vLLM's way."""
        if bias is not None:
            return super().apply(layer, x, bias)  # type: ignore[misc]
        return torch.ops.vllm_bamba.skinny_linear(x, layer.weight)


class SkinnyLinearMethod(SkinnyProducts, UnquantizedLinearMethod):
    """For vLLM's linear layers."""


class SkinnyLMHeadMethod(SkinnyProducts, UnquantizedEmbeddingMethod):
    """For the language model's head."""


def use_skinny_products(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Have `model`'s linear layers multiply few rows in our kernel, where there are launches for GPU and weight.

    They must not be quantised. Does nothing where `skinny_tuning` finds none.
    """
    tuning = skinny_tuning(vllm_config)
    if tuning is None:
        return
    for layer in model.modules():
        method = type(getattr(layer, "quant_method", None))
        if method not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            continue
        if not tuning.launches(*layer.weight.shape):  # type: ignore[arg-type]
            continue
        if isinstance(layer, LinearBase):
            layer.quant_method = SkinnyLinearMethod()
        elif isinstance(layer, ParallelLMHead):
            layer.quant_method = SkinnyLMHeadMethod()
