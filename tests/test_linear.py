"""Which layers multiply few rows in our kernel."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from vllm_bamba.linear import SkinnyLinearMethod, SkinnyLMHeadMethod, use_skinny_products
from vllm_bamba.stream import SkinnyStream, Stream, stream_for


class OtherMethod(UnquantizedLinearMethod):
    """Stands for a quantised layer's."""


def layer(kind: type[nn.Module], method: type, columns: int = 512, depth: int = 4096) -> nn.Module:
    """As much of one of vLLM's layers as is looked at."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.weight = nn.Parameter(torch.empty(columns, depth, dtype=torch.bfloat16), requires_grad=False)
    made.quant_method = method()
    return made


def methods(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), gpu: str = "NVIDIA H200", **changes: object
) -> list[type]:
    """Of a linear layer, the head, an embedding, a quantised layer and one whose sums no launch divides."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    found = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
    monkeypatch.setattr(platform, "get_device_capability", found)
    monkeypatch.setattr(platform, "get_device_name", classmethod(lambda cls, device_id=0: gpu))
    layers = nn.ModuleList(
        [
            layer(ReplicatedLinear, UnquantizedLinearMethod),
            layer(ParallelLMHead, UnquantizedEmbeddingMethod),
            layer(VocabParallelEmbedding, UnquantizedEmbeddingMethod),
            layer(ReplicatedLinear, OtherMethod),
            layer(ReplicatedLinear, UnquantizedLinearMethod, depth=200),
        ]
    )
    values = {"backend": "auto", "dtype": torch.bfloat16} | changes
    config = SimpleNamespace(
        kernel_config=SimpleNamespace(linear_backend=values["backend"]),
        model_config=SimpleNamespace(dtype=values["dtype"]),
    )
    use_skinny_products(layers, config)  # type: ignore[arg-type]
    return [type(made.quant_method) for made in layers]


VLLMS = [
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
    UnquantizedEmbeddingMethod,
    OtherMethod,
    UnquantizedLinearMethod,
]


def test_plain_linear_layers_and_the_head_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods(monkeypatch) == [SkinnyLinearMethod, SkinnyLMHeadMethod, *VLLMS[2:]]


@pytest.mark.parametrize(
    "changes", [{"capability": (8, 0)}, {"gpu": "NVIDIA H20"}, {"backend": "other"}, {"dtype": torch.float16}], ids=str
)
def test_none_does_elsewhere_or_where_the_user_chose(changes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods(monkeypatch, **changes) == VLLMS


def test_none_does_where_batches_must_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert methods(monkeypatch) == VLLMS


def test_a_product_is_that_of_the_weight_and_a_bias_is_added_before_rounding() -> None:
    made = layer(ReplicatedLinear, SkinnyLinearMethod, columns=48, depth=96)
    nn.init.normal_(made.weight)
    x, bias = torch.randn(3, 96, dtype=torch.bfloat16), torch.randn(48, dtype=torch.bfloat16)
    assert torch.equal(made.quant_method.apply(made, x), nn.functional.linear(x, made.weight))
    made.cpu_linear = nn.functional.linear  # what vLLM's method calls on a CPU
    assert torch.equal(made.quant_method.apply(made, x, bias), nn.functional.linear(x, made.weight, bias))


@pytest.mark.parametrize(
    ("method", "bias", "ranks", "adapters", "stream"),
    [
        (SkinnyLinearMethod, None, 1, None, SkinnyStream),
        (UnquantizedLinearMethod, None, 1, None, Stream),
        (OtherMethod, None, 1, None, Stream),
        (SkinnyLinearMethod, torch.zeros(512), 1, None, Stream),
        (SkinnyLinearMethod, None, 2, None, Stream),
        (SkinnyLinearMethod, None, 1, object(), Stream),
    ],
    ids=["skinny", "as_vllm", "quantised", "bias", "two_ranks", "adapters"],
)
def test_a_stream_is_skinny_where_every_layer_is(method, bias, ranks, adapters, stream) -> None:
    layers = nn.ModuleList([layer(ReplicatedLinear, kind) for kind in (SkinnyLinearMethod, method)])
    layers[0].bias, layers[1].bias = None, bias
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=ranks), lora_config=adapters)
    assert stream_for(layers, config) is stream  # type: ignore[arg-type]
