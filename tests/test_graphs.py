"""Which CUDA graphs vLLM is told to make, beside what it makes on its own; no GPU is needed for that."""

import os
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_config import engine, raw
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.v1.sample.ops import topk_topp_sampler

from vllm_bamba import compat, graphs
from vllm_bamba.config import BambaShape
from vllm_bamba.graphs import choose_graphs, graph_sizes
from vllm_bamba.step_options import is_all_kernels

ENVIRONMENT = "VLLM_USE_BREAKABLE_CUDAGRAPH"


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(compat.current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    monkeypatch.setattr(platform, "is_cuda_alike", lambda self: True)
    for asked in ("is_device_capability", "has_device_capability"):
        monkeypatch.setattr(platform, asked, classmethod(lambda cls, asked: asked == (9, 0)))
    monkeypatch.setattr(platform, "is_device_capability_family", classmethod(lambda cls, family: family == 90))
    monkeypatch.setattr(platform, "get_device_capability", classmethod(lambda cls: SimpleNamespace(major=9, minor=0)))
    monkeypatch.setattr(platform, "get_device_name", classmethod(lambda cls: "NVIDIA H200"))
    monkeypatch.setattr(compat, "_set_here", set())
    monkeypatch.setattr(compat, "mamba_mixer2", SimpleNamespace(__wrapped__=None))
    monkeypatch.setenv(ENVIRONMENT, "")  # so that it is put back afterwards, whatever becomes of it
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)


def configured(sequences: int = 256, tokens: int = 8192, **changes: object) -> SimpleNamespace:
    """What vLLM gives the hook, with its own defaults."""
    config = engine(**changes)
    config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens = sequences, tokens
    config.performance_mode, config.model_config.enforce_eager = "balanced", False
    config.kernel_config = SimpleNamespace(linear_backend="auto")
    config.compilation_config = CompilationConfig()
    return config


def choose(config: SimpleNamespace) -> None:
    choose_graphs(config, BambaShape.from_hf(config.model_config.hf_config))  # type: ignore[arg-type]


def vllms_own(config: SimpleNamespace) -> list[int]:
    """The sizes that vLLM makes of a configuration."""
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.uniform_decode_query_len = 1
    VllmConfig._set_cudagraph_sizes(config)  # type: ignore[arg-type]
    return compilation.cudagraph_capture_sizes


@pytest.mark.parametrize("sequences", [1, 3, 100, 256, 300, 1024])
@pytest.mark.parametrize("tokens", [60, 2048])
def test_graphs_are_some_of_vllms_up_to_the_same_largest(sequences: int, tokens: int, h200: None) -> None:
    config = configured(sequences, tokens)
    choose(config)
    ours = list(config.compilation_config.cudagraph_capture_sizes)
    assert vllms_own(config) == ours, "vLLM takes them as they are"
    theirs = vllms_own(configured(sequences, tokens))
    assert set(ours) <= set(theirs)
    assert ours[-1] == theirs[-1]
    assert sequences in ours or sequences > theirs[-1]


def test_there_are_31_of_51_and_no_batch_is_padded_by_more_than_31_tokens() -> None:
    sizes = graph_sizes(512, [])
    assert len(sizes) == 31
    assert max(after - before for before, after in pairwise(sizes)) == 32
    assert all(after - before <= 16 for before, after in pairwise(sizes) if before < 256)


@pytest.mark.parametrize(
    "change",
    [
        {"cudagraph_capture_sizes": [1, 7]},
        {"max_cudagraph_capture_size": 64},
        {"performance_mode": "interactivity"},
        {"num_speculative_tokens": 2},
    ],
    ids=str,
)
def test_sizes_that_were_chosen_or_depend_on_drafts_are_left_to_vllm(change: dict[str, object], h200: None) -> None:
    config = configured()
    for place in (config, config.compilation_config):
        vars(place).update({name: value for name, value in change.items() if name in vars(place)})
    choose(config)
    assert config.compilation_config.cudagraph_capture_sizes == change.get("cudagraph_capture_sizes")


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("", {}),
        ("", {"caching": True}),
        ("", {"drafts": 2}),
        ("two ranks", {"tensor": 2}),
        ("two stages", {"stages": 2}),
        ("weights on the host", {"on_host": 1}),
        ("adapters", {"lora": object()}),
        ("quantised", {"quantization": "fp8"}),
        ("fp16", {"dtype": torch.float16}),
        ("blocks go to the host", {"offloading": 1.0}),
        *((field, {"hf_config": raw(**{field: True})}) for field in ("attention_bias", "mlp_bias", "mamba_proj_bias")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_compiled_where_all_is_kernels(why: str, changes: dict[str, object], h200: None) -> None:
    config = configured(**changes)
    choose(config)
    assert (ENVIRONMENT in os.environ) is not bool(why)


@pytest.mark.parametrize(
    "otherwise",
    [
        lambda config, patch: patch.setenv("VLLM_BATCH_INVARIANT", "1"),
        lambda config, patch: setattr(config.kernel_config, "linear_backend", "cutlass"),
        lambda config, patch: setattr(config, "additional_config", {"bamba_fused_step": False}),
        lambda config, patch: setattr(config.model_config, "enforce_eager", True),
        lambda config, patch: setattr(config.compilation_config, "mode", 3),
        lambda config, patch: setattr(config.compilation_config, "backend", "eager"),
        lambda config, patch: setattr(config.compilation_config, "compile_sizes", [1]),
        lambda config, patch: patch.setattr(
            type(compat.current_platform), "get_device_name", classmethod(lambda cls: "NVIDIA GH200 480GB")
        ),
        lambda config, patch: patch.setattr(compat, "mamba_mixer2", object()),  # as in 0.32
    ],
    ids=["batch-invariant", "linear-backend", "vllms-step", "eager", "mode", "backend", "compile-sizes", "gpu", "0.32"],
)
def test_it_is_vllms_way_where_others_kernels_the_compiler_or_no_graphs_are_asked_for(
    otherwise: Callable[[SimpleNamespace, pytest.MonkeyPatch], None], h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    otherwise(config, monkeypatch)
    choose(config)
    assert ENVIRONMENT not in os.environ


def test_the_environment_is_the_users_or_that_of_the_last_bamba(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compat.logger, "info", lambda message, *of: said.append(message % of))
    choose(configured())
    assert os.environ[ENVIRONMENT] == "1"
    choose(configured())
    assert os.environ[ENVIRONMENT] == "1"
    choose(configured(tensor=2))
    assert ENVIRONMENT not in os.environ
    assert [f"{ENVIRONMENT}=0" in message for message in said] == [True], "said once"
    for chosen in "01":
        monkeypatch.setenv(ENVIRONMENT, chosen)
        for tensor in (1, 2):
            choose(configured(tensor=tensor))
            assert os.environ[ENVIRONMENT] == chosen


def test_without_a_gpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "is_all_kernels", lambda *of: pytest.fail("asked"))
    config = configured()
    before = repr(config)
    choose(config)
    assert repr(config) == before
    assert not is_all_kernels(config, BambaShape.from_hf(config.model_config.hf_config))  # type: ignore[arg-type]


def test_kernels_of_the_sampler_are_made_for_one_row_few_and_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def apply(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
        assert (logits.dtype, k.dtype, p.dtype) == (torch.float32, torch.int32, torch.float32)
        assert k.shape == p.shape == logits.shape[:1]
        assert logits.shape[1] == 48
        seen.append(len(logits))

    def apply_more(
        logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor, has_topp_only_rows: bool = True
    ) -> None:  # as in 0.33
        assert not has_topp_only_rows
        apply(logits, k, p)

    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    for function in (apply, apply_more):
        monkeypatch.setattr(topk_topp_sampler, "apply_top_k_top_p", function)
        seen.clear()
        torch.set_default_dtype(torch.bfloat16)  # as while vLLM builds a model
        try:
            for call in compat.sampler_warm_ups(48, torch.device("cpu")):
                call()
        finally:
            torch.set_default_dtype(torch.float32)
        assert seen == [1, 2, 128]
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert compat.sampler_warm_ups(48, torch.device("cpu")) == []


def test_the_installed_sampler_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    monkeypatch.setattr(topk_topp_sampler, "HAS_TRITON", False)  # vLLM's kernel needs a GPU
    for call in compat.sampler_warm_ups(48, torch.device("cpu")):
        call()
