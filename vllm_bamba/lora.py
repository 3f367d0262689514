"""LoRA on `in_proj` where B and C are copied to several ranks."""

import torch
from torch import nn
from vllm.lora.layers import MergedColumnParallelLinearVariableSliceWithLoRA

from vllm_bamba.mixer import InProjectionLinear


class InProjectionWithLoRA(MergedColumnParallelLinearVariableSliceWithLoRA):
    """vLLM's wrapper for fused projections, fed with an adapter whose B and C rows are repeated like the weight's."""

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: object, **kwargs: object) -> bool:
        return isinstance(source_layer, InProjectionLinear)

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """lora_a [rank, hidden], lora_b [in_proj rows, rank]; vLLM's warm-up passes a shorter lora_b of zeros."""
        rows = self.base_layer.shard.in_proj_sources[-1].stop
        if len(lora_b) == rows:
            lora_b = self.base_layer.with_copies(lora_b, 0)
        elif lora_b.any():
            raise ValueError(f"the adapter's lora_B of in_proj has {len(lora_b)} rows, the model's in_proj {rows}")
        super().set_lora(index, lora_a, lora_b)
