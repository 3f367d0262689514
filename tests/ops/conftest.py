"""What every operator's test needs."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config.mamba import MambaConfig
from vllm.model_executor.layers.mamba.ops import ssu_dispatch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec


@pytest.fixture(autouse=True)
def update_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's workers do before the first step; the GPU path asks for it."""
    monkeypatch.setattr(ssu_dispatch, "_mamba_ssu_backend", None)
    mamba = MambaSpec(
        shapes=((1, 1),), dtypes=(torch.float32,), block_size=1, mamba_type=MambaAttentionBackendEnum.MAMBA2
    )
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=mamba)])
    ssu_dispatch.initialize_mamba_ssu_backend(MambaConfig(), groups)
