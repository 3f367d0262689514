"""When prefix-aware slots are on, and what users can set.

Options of the engine, in vLLM's `additional_config` (`--additional-config '{"bamba_prefix_share": 0.5}'`):

| key | default | meaning |
|---|---|---|
| `bamba_prefix_slots` | true | false: vLLM's own caching, in steps of the attention block (528 tokens for 9B) |
| `bamba_prefix_share` | 0.75 | the largest part of the cache that slots may take; requests that run come first anyway |

vLLM's `--prefix-match-unit` sets the distance of slots in tokens, 8, 16 (the default) or 32. The states of answers are
copied once per unit, but not those of the fused step on Model Runner V2 if a unit is not longer than `bamba_replay`.

Option of a request, in `SamplingParams(extra_args=...)`, over HTTP in `"vllm_xargs"`:

| key | meaning |
|---|---|
| `bamba_shared_tokens` | tokens at the prompt's start that other requests will share: they hit it from the second on |

A chat that says nothing shares its system messages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import MambaSpec

from vllm_bamba import logger
from vllm_bamba.compat import measure_system_messages, moves_blocks, replace_spec, set_state_block
from vllm_bamba.options import given_options
from vllm_bamba.prefix.chat import KEY
from vllm_bamba.prefix.policy import UNIT
from vllm_bamba.state import INPUTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

SCHEDULER = "vllm_bamba.prefix.scheduler.build"  # with slots or, where caching is off, without
DRAFTING = "vllm_bamba.prefix.scheduler.build_drafting"  # with drafted tokens
# tokens: all of a state's inputs lie behind the position before, and half of one divides any block of attention
UNITS = (8, 16, 32)
assert min(UNITS) > INPUTS


@dataclass(frozen=True)
class SlotOptions:
    """What `additional_config` says."""

    on: bool = True
    share: float = 0.75

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> SlotOptions:
        """Read and check.

        Raises:
            ValueError: an option has a name or a value that makes no sense.
        """
        given = given_options(vllm_config)
        on = given.get("bamba_prefix_slots", cls.on)
        share = given.get("bamba_prefix_share", cls.share)
        if not isinstance(on, bool):
            raise ValueError(f"additional_config: bamba_prefix_slots is {on!r}, expected true or false.")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"additional_config: bamba_prefix_share is {share!r}, expected a number in (0, 1].")
        if not on and "bamba_prefix_share" in given:
            raise ValueError("additional_config: bamba_prefix_share needs bamba_prefix_slots: true.")
        return cls(on, share)


def shared_tokens(sampling_params: Any) -> int:
    """Tokens that the request says others will share, 0 where it says nothing that can be used."""
    return _tokens(sampling_params, "bamba_shared_tokens")


def system_tokens(sampling_params: Any) -> int:
    """Tokens of a chat's system messages, 0 for other requests and where the request itself says what is shared."""
    return 0 if shared_tokens(sampling_params) else _tokens(sampling_params, KEY)


def _tokens(sampling_params: Any, key: str) -> int:
    value = (getattr(sampling_params, "extra_args", None) or {}).get(key, 0)
    if isinstance(value, float) and value.is_integer():  # what goes over HTTP may become one
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    _say_ignored(key)
    return 0


@functools.cache
def _say_ignored(key: str) -> None:
    logger.warning("%s of a request is not a number of tokens and is ignored; this is said once.", key)


def active(vllm_config: VllmConfig) -> bool:
    """Whether this engine uses slots; the same in every one of its processes."""
    return vllm_config.cache_config.enable_prefix_caching and vllm_config.scheduler_config.scheduler_cls == SCHEDULER


def unit_of(vllm_config: VllmConfig) -> int:
    """Tokens between two slots, where there are any; `configure` leaves vLLM's option, and hashes, at half of them."""
    half = vllm_config.cache_config.prefix_match_unit
    assert half is not None
    return 2 * half


def configure(vllm_config: VllmConfig, has_attention: bool = True, has_mamba: bool = True) -> None:
    """Turn slots on, or say why there are none; `has_attention`, `has_mamba`: whether the model has such a layer.

    Without prefix caching the scheduler is ours, too, unless `bamba_prefix_slots` is off: it asks less of the cache.
    With drafted tokens it is vLLM's but for what that one does wrong.

    Raises:
        ValueError: an option has a value that makes no sense, or vLLM's own caching would be wrong with it.
    """
    cache = vllm_config.cache_config
    options = SlotOptions.of(vllm_config)
    if vllm_config.scheduler_config.scheduler_cls in (SCHEDULER, DRAFTING):
        return  # configured before: what stands in the options now is ours, not the user's
    reason = _obstacle(vllm_config, has_attention, has_mamba)
    if vllm_config.speculative_config is not None and vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = DRAFTING
    if not cache.enable_prefix_caching:
        logger.warning("Prefix caching is off by option: every request computes its whole prompt.")
        if options.on and reason is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        return
    if reason:
        options = SlotOptions(on=False)
        logger.warning("Prefixes are cached in steps of the attention block only: %s.", reason)
    if not options.on:
        if cache.prefix_match_unit is not None:
            raise ValueError(
                "--prefix-match-unit without prefix-aware slots can resume from wrong states "
                "(vLLM 0.32 and 0.33): leave it out, or turn bamba_prefix_slots on."
            )
        return
    unit = cache.prefix_match_unit or UNIT
    if unit not in UNITS:
        raise ValueError(f"--prefix-match-unit {unit}: expected one of {UNITS} tokens.")
    if vllm_config.model_config.max_model_len <= unit:
        logger.warning(
            "No prefix can be hit: the context of %d tokens is not longer than a unit of %d.",
            vllm_config.model_config.max_model_len,
            unit,
        )
    # vLLM finds hits inside of attention blocks only where hashes are finer than the state's block
    cache.prefix_match_unit = unit // 2
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    measure_system_messages(active)


def _obstacle(vllm_config: VllmConfig, has_attention: bool, has_mamba: bool) -> str | None:
    """Why there can be no slots: the first thing found that they were not made for or tried with; else None."""
    parallel, events = vllm_config.parallel_config, vllm_config.kv_events_config
    reasons = {
        "the model has no attention layer": not has_attention,
        "the model has no Mamba layer": not has_mamba,
        "another scheduler class is set": vllm_config.scheduler_config.scheduler_cls is not None,
        "drafts of speculative decoding skip positions": vllm_config.speculative_config is not None,
        "a KV connector moves blocks itself": moves_blocks(vllm_config),
        "KV-cache events are on": events is not None and events.enable_kv_cache_events,
        "context parallelism splits blocks": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "prefix_cache_retention_interval is set": bool(vllm_config.cache_config.prefix_cache_retention_interval),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def state_spec(spec: KVCacheSpec, vllm_config: VllmConfig) -> KVCacheSpec:
    """A Mamba layer's cache specification: with slots, one that has a block for every unit."""
    cache = vllm_config.cache_config
    spec = replace_spec(MambaSpec, spec, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
    if not active(vllm_config):
        if cache.enable_prefix_caching and vllm_config.model_config.max_model_len <= spec.block_size:
            logger.warning(
                "No prefix can be hit: the context of %d tokens is not longer than a block of %d.",
                vllm_config.model_config.max_model_len,
                spec.block_size,
            )
        return spec
    from vllm_bamba.prefix.managers import BambaStateSpec  # importing it registers the managers: for engines with slots

    unit = unit_of(vllm_config)
    set_state_block(vllm_config, unit)
    return replace_spec(BambaStateSpec, spec, block_size=unit)


def attention_spec(spec: KVCacheSpec | None, vllm_config: VllmConfig) -> KVCacheSpec | None:
    """An attention layer's cache specification: with slots, one whose blocks have keys at every unit."""
    if spec is None or not active(vllm_config):
        return spec
    from vllm_bamba.prefix.managers import BambaAttentionSpec

    return replace_spec(BambaAttentionSpec, spec)
