"""Layers that are called one by one, as where vLLM brings a layer's weights when it calls the layer."""

from collections.abc import Iterator

import pytest
from parity import Engine, Reference, random_prompts, save_random
from torch import nn
from vllm.model_executor.offloader import BaseOffloader, PrefetchOffloader
from vllm.v1.worker import gpu_model_runner


class OneLayer(BaseOffloader):
    """vLLM's own hooks around layers, and weights that are NaN but for the layer that is called."""

    prefetch_step = 1

    def __init__(self) -> None:
        self.module_offloaders: list[nn.Module] = []
        self.calls: list[int] = []

    def wrap_modules(self, modules_generator: Iterator[nn.Module], *args: object, **kwargs: object) -> list[nn.Module]:
        self.module_offloaders = list(modules_generator)
        for index, layer in enumerate(self.module_offloaders):
            PrefetchOffloader._hook_module_forward(self, index, layer)  # type: ignore[arg-type]
        return self.module_offloaders

    def _wait_for_layer(self, layer_idx: int) -> None:
        if not self.calls:
            self.weights = [[(w, w.data.clone()) for w in layer.parameters()] for layer in self.module_offloaders]
        self.calls.append(layer_idx)
        for index, of_layer in enumerate(self.weights):
            for weight, value in of_layer:
                weight.data.copy_(value) if index == layer_idx else weight.data.fill_(float("nan"))


def test_layers_read_no_weights_but_their_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, offloader = save_random(tmp_path), OneLayer()
    monkeypatch.setattr(gpu_model_runner, "create_offloader", lambda config: offloader)
    with Engine(path) as engine:
        answers = engine.answers(random_prompts([1, 20, 33]), 5)
    assert offloader.calls[:4] == [0, 1, 2, 3]
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)
