"""The model's entry in vLLM's registry."""

from unittest import mock

from vllm.model_executor.models import registry


class InspectedHere(registry._LazyRegisteredModel):
    """An entry whose model is imported when one is asked for, in the process that asks.

    vLLM keeps on disk what it wants to know of a model's class. Where it does not know yet, it imports the class in a
    new Python, lest the import wake CUDA up and keep workers from being forked. Ours does not, and a second import of
    vLLM and torch is a good part of a first start.
    """

    def inspect_model_cls(self) -> registry._ModelInfo:
        with mock.patch.object(registry, "_run_in_subprocess", lambda inspect: inspect(), create=True):
            return super().inspect_model_cls()
