"""Names of options in vLLM's `additional_config`; `step_options.py` and `prefix/options.py` say what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "bamba_"
OF_THE_STEP = ("bamba_fused_step", "bamba_replay", "bamba_state_dtype", "bamba_prefill_graphs")
OF_SLOTS = ("bamba_prefix_slots", "bamba_prefix_share")


def given_options(vllm_config: VllmConfig) -> dict[str, Any]:
    """What the user gave, for us and for others.

    Raises:
        ValueError: a name that begins like ours is none of them.
    """
    given = vllm_config.additional_config
    given = given if isinstance(given, dict) else {}
    known = (*OF_SLOTS, *OF_THE_STEP)
    unknown = sorted(name for name in given if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ValueError(f"additional_config: {', '.join(unknown)} unknown, there are {', '.join(known)}.")
    return given
