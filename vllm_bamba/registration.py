"""The model's entry in vLLM's registry."""

import importlib.util
import pathlib

from vllm.model_executor.models import registry


class InspectedHere(registry._LazyRegisteredModel):
    """An entry whose model is imported when one is asked for, in the process that asks.

    vLLM keeps on disk what it wants to know of a model's class. Where it does not know yet, it imports the class in a
    new Python, lest the import wake CUDA up and keep workers from being forked. Ours does not, and a second import of
    vLLM and torch is a good part of a first start.
    """

    def inspect_model_cls(self) -> registry._ModelInfo:
        found = importlib.util.find_spec(self.module_name)
        assert found is not None
        assert found.origin is not None
        source = self._get_modelinfo_module_hash(pathlib.Path(found.origin))
        known = self._load_modelinfo_from_cache(source)
        if known is None:
            known = registry._ModelInfo.from_model_cls(self.load_model_cls())
            self._save_modelinfo_to_cache(known, source)
        return known
