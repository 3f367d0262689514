"""When slots are on, and what is said where they are not."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vllm_bamba.prefix import options
from vllm_bamba.prefix.options import (
    DRAFTING,
    SCHEDULER,
    UNITS,
    SlotOptions,
    active,
    configure,
    shared_tokens,
    system_tokens,
)
from vllm_bamba.step_options import anchors_slots


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """vLLM's logger has handlers of its own; pytest listens at the root."""
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def config(**changes: object) -> SimpleNamespace:
    """What of vLLM's configuration decides; `part__field` changes one."""
    made = SimpleNamespace(
        additional_config={},
        cache_config=SimpleNamespace(
            enable_prefix_caching=True,
            prefix_match_unit=None,
            prefix_cache_retention_interval=0,
            kv_offloading_size=None,
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        setattr(getattr(made, parts[0]) if parts else made, field, value)
    return made


def test_slots_are_on_by_default(caplog: pytest.LogCaptureFixture) -> None:
    made = config()
    configure(made)
    configure(made)  # a second time changes nothing
    assert made.scheduler_config.scheduler_cls == SCHEDULER
    assert made.cache_config.prefix_match_unit == 8  # hashes at half of a unit
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("replay", "unit", "caching", "v2", "anchored"),
    [
        (16, None, True, True, True),
        (32, 32, True, True, True),
        (8, None, True, True, False),
        (16, 32, True, True, False),
        (16, None, True, False, False),
        (16, None, False, True, False),
    ],
    ids=["default", "units of 32", "short rings", "long units", "Model Runner V1", "no caching"],
)
def test_slots_are_anchored_where_a_ring_lasts_for_a_unit_and_is_folded_at_its_end(
    replay: int, unit: int | None, caching: bool, v2: bool, anchored: bool
) -> None:
    made = config(
        cache_config__prefix_match_unit=unit, cache_config__enable_prefix_caching=caching, use_v2_model_runner=v2
    )
    configure(made)
    assert anchors_slots(made, replay) is anchored


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_a_model_of_one_kind_of_layer_is_left_to_vllm(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    made = config()
    configure(made, **{f"has_{kind}": False})
    assert made.scheduler_config.scheduler_cls is None
    assert f"no {kind} layer" in caplog.text.lower()


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_can_be_chosen(unit: int) -> None:
    made = config(cache_config__prefix_match_unit=unit)
    configure(made)
    assert made.cache_config.prefix_match_unit == unit // 2


def test_a_mistyped_option_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"bamba_prefix_slot unknown, there are bamba_prefix_slots"):
        SlotOptions.of(config(additional_config={"bamba_prefix_slot": True, "of_others": 1}))


def test_slots_are_on_unless_turned_off() -> None:
    assert SlotOptions.of(config()).on
    assert not SlotOptions.of(config(additional_config={"bamba_prefix_slots": False})).on


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler_config__scheduler_cls": "some.Scheduler"}, "another scheduler class"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "events"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"cache_config__kv_offloading_size": 1.0}, "KV connector"),
        ({"cache_config__prefix_cache_retention_interval": 528}, "prefix_cache_retention_interval"),
    ],
)
def test_what_was_not_tried_with_slots_leaves_vllm_alone_and_says_so(
    changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(**changes)
    configure(made)
    assert made.scheduler_config.scheduler_cls != SCHEDULER
    assert made.cache_config.prefix_match_unit is None
    assert reason in caplog.text


def test_a_match_unit_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="--prefix-match-unit"):
        configure(config(additional_config={"bamba_prefix_slots": False}, cache_config__prefix_match_unit=16))


@pytest.mark.parametrize(
    ("changes", "scheduler"),
    [
        ({}, SCHEDULER),
        ({"speculative_config": object()}, DRAFTING),
        ({"speculative_config": object(), "additional_config": {"bamba_prefix_slots": False}}, DRAFTING),
        ({"speculative_config": object(), "scheduler_config__scheduler_cls": "some.Scheduler"}, "some.Scheduler"),
        ({"additional_config": {"bamba_prefix_slots": False}}, None),
    ],
)
def test_without_caching_there_are_no_slots_but_our_scheduler_where_it_was_tried(
    changes: dict[str, object], scheduler: str | None
) -> None:
    made = config(cache_config__enable_prefix_caching=False, **changes)
    configure(made)
    assert made.scheduler_config.scheduler_cls == scheduler
    assert not active(made)
    assert made.cache_config.prefix_match_unit is None


def test_no_caching_and_short_contexts_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    configure(config(cache_config__enable_prefix_caching=False))
    configure(config(model_config__max_model_len=16))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "Prefix caching is off by option",
        "No prefix can be hit",
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"bamba_prefix_slots": 1},
        {"bamba_prefix_share": 0},
        {"bamba_prefix_share": 1.5},
        {"bamba_prefix_share": 0.5, "bamba_prefix_slots": False},
    ],
)
def test_a_senseless_option_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        SlotOptions.of(config(additional_config=given))


@pytest.mark.parametrize("unit", [2, 11, 24, 48])
def test_a_unit_that_does_not_divide_blocks_or_is_shorter_than_a_convolution_is_refused(unit: int) -> None:
    with pytest.raises(ValueError, match=rf"--prefix-match-unit {unit}: expected one of \(8, 16, 32\)"):
        configure(config(cache_config__prefix_match_unit=unit))


@pytest.mark.parametrize("value", [None, -1, "100", 1.5, float("nan"), True])
def test_a_shared_length_that_is_none_is_ignored_and_that_is_said_once(
    value: object, caplog: pytest.LogCaptureFixture
) -> None:
    options._say_ignored.cache_clear()
    for _ in range(2):
        assert shared_tokens(SimpleNamespace(extra_args={"bamba_shared_tokens": value})) == 0
    assert [record.message for record in caplog.records] == [
        "bamba_shared_tokens of a request is not a number of tokens and is ignored; this is said once."
    ]


def test_a_shared_length_may_have_become_a_float_and_may_be_absent(caplog: pytest.LogCaptureFixture) -> None:
    for value, tokens in ((100, 100), (100.0, 100), (0, 0)):
        assert shared_tokens(SimpleNamespace(extra_args={"bamba_shared_tokens": value})) == tokens
    for given in ({"other": 3}, None):
        assert shared_tokens(SimpleNamespace(extra_args=given)) == 0
    assert not caplog.records


def test_what_a_request_says_comes_before_its_system_messages() -> None:
    assert system_tokens(SimpleNamespace(extra_args={"bamba_system_tokens": 80})) == 80
    assert system_tokens(SimpleNamespace(extra_args={"bamba_system_tokens": 80, "bamba_shared_tokens": 20})) == 0
    assert system_tokens(SimpleNamespace(extra_args=None)) == 0
