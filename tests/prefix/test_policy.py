"""Which positions get a slot and which slot goes, in plain integers."""

import random

import pytest

from vllm_bamba.prefix.policy import (
    LEAST_GAIN,
    SPREAD_FROM,
    Kind,
    Slot,
    SlotTable,
    chunk_tokens,
    inner_position,
    plan_prefill,
)

ROOT: list[str] = []


def always(key: object) -> bool:
    return True


@pytest.mark.parametrize(("tokens", "end"), [(17, 16), (32, 16), (33, 32), (300, 288)])
def test_a_prompt_leaves_its_last_unit_before_the_last_token(tokens: int, end: int) -> None:
    assert plan_prefill(tokens, hit=0) == {end: Kind.PROMPT}


@pytest.mark.parametrize(("tokens", "hit"), [(1, 0), (16, 0), (300, 288)])
def test_a_prompt_leaves_nothing_where_it_adds_no_unit(tokens: int, hit: int) -> None:
    assert plan_prefill(tokens, hit) == {}


def test_a_parting_is_kept_only_for_its_gain() -> None:
    assert plan_prefill(600, hit=160, junction=160 + LEAST_GAIN)[160 + LEAST_GAIN] is Kind.SHARED
    assert plan_prefill(600, hit=160, junction=160 + LEAST_GAIN - 16) == {592: Kind.PROMPT}


def test_a_given_shared_part_is_kept_at_its_last_whole_unit() -> None:
    assert plan_prefill(356, hit=0, hint=250) == {240: Kind.SHARED, 352: Kind.PROMPT}
    assert plan_prefill(356, hit=0, hint=9999) == {352: Kind.SHARED}  # no further than the prompt
    assert plan_prefill(356, hit=240, hint=250) == {352: Kind.PROMPT}  # no further back than the hit


def test_the_end_of_system_messages_is_kept_whatever_it_saves() -> None:
    assert plan_prefill(100, hit=0, system=40) == {32: Kind.SYSTEM, 96: Kind.PROMPT}
    assert plan_prefill(100, hit=32, system=40) == {96: Kind.PROMPT}
    assert plan_prefill(100, hit=0, system=15) == {96: Kind.PROMPT}
    assert plan_prefill(100, hit=0, system=99) == {96: Kind.SYSTEM}


def test_long_prompts_leave_some_on_the_way_where_memory_allows() -> None:
    assert plan_prefill(SPREAD_FROM, hit=0) == {
        1024: Kind.SPREAD, 1536: Kind.SPREAD, 1792: Kind.SPREAD, 2032: Kind.PROMPT
    }  # fmt: skip
    assert plan_prefill(SPREAD_FROM, hit=0, roomy=False) == {2032: Kind.PROMPT}
    assert plan_prefill(SPREAD_FROM - 1, hit=0) == {2032: Kind.PROMPT}


def test_a_chunk_ends_at_the_first_stop_inside_it() -> None:
    stops = (240, 352)
    assert chunk_tokens(0, 356, stops) == 240
    assert chunk_tokens(240, 116, stops) == 112
    assert chunk_tokens(352, 4, stops) == 4
    assert chunk_tokens(0, 240, stops) == 240  # the budget ends it there anyway
    assert chunk_tokens(100, 50, stops) == 50


def test_a_chunk_need_not_stop_where_it_keeps_the_state_in_passing() -> None:
    stops = (240, 352)
    assert chunk_tokens(240, 116, stops, kept=352) == 116
    assert chunk_tokens(0, 356, stops, kept=352) == 240  # the other stop comes first
    assert chunk_tokens(0, 100, stops, kept=96) == 100


def test_a_chunk_keeps_the_state_at_its_last_unit_if_that_is_a_unit_behind_its_start() -> None:
    assert inner_position(0, 356) == 352
    assert inner_position(0, 352) == 336  # the state at 352 is the chunk's own
    assert inner_position(336, 356) == 352
    assert inner_position(337, 356) == 0
    assert inner_position(352, 356) == 0
    assert inner_position(0, 16) == 0
    assert inner_position(0, 17) == 16
    assert inner_position(100, 200, unit=32) == 192


def table(capacity: int = 8) -> SlotTable:
    return SlotTable(capacity)


def test_prompts_that_come_once_push_out_each_other_and_not_what_is_shared() -> None:
    slots = table()
    slots.add("system", 256, ROOT, Kind.PROMPT, 11)
    slots.hit("system")
    for i in range(100):
        slots.add(i, 20_000, ROOT, Kind.PROMPT, 30)
        if slots.full:
            victim = slots.victim(always, proven=True)
            assert victim is not None
            slots.remove(victim)
    assert "system" in slots


def test_the_least_value_goes_first() -> None:
    slots = table()
    slots.add("short", 100, ROOT, Kind.PROMPT, 11)
    slots.add("long", 1000, ROOT, Kind.PROMPT, 12)
    assert slots.victim(always, proven=False) == "short"
    slots.add("longer by little", 1016, ["long"], Kind.PROMPT, 12)
    assert slots.victim(always, proven=False) == "longer by little"  # it saves 16 tokens more than the one above it
    slots.remove("long")
    assert slots.victim(always, proven=False) == "short"  # now it saves 1016


def test_age_counts() -> None:
    slots = table(100)
    slots.add("old", 220, ROOT, Kind.PROMPT, 11)
    for i in range(5):
        slots.add(i, 200, ROOT, Kind.PROMPT, 11)
    assert slots.victim(always, proven=False) == "old"


def test_what_was_of_use_goes_only_where_allowed_and_last() -> None:
    slots = table()
    slots.add("used", 16, ROOT, Kind.PROMPT, 11)
    slots.hit("used")
    assert slots.victim(always, proven=False) is None
    assert slots.victim(always, proven=True) == "used"
    slots.add("unused", 5000, ROOT, Kind.PROMPT, 20)
    assert slots.victim(always, proven=True) == "unused"


def test_a_busy_slot_stays() -> None:
    slots = table()
    slots.add("busy", 16, ROOT, Kind.PROMPT, 11)
    assert slots.victim(lambda key: key != "busy", proven=True) is None


def test_slots_of_use_are_at_most_three_quarters() -> None:
    slots = table(4)
    for i in range(4):
        slots.add(i, 100 * (i + 1), ROOT, Kind.SHARED, 11)
    assert [slots[i].uses for i in range(4)] == [0, 1, 1, 1]  # the fourth was one too many; the least valuable pays


def test_a_system_message_is_of_use_once_a_second_chat_has_it() -> None:
    slots = table()
    slots.add("parting", 100, ROOT, Kind.SHARED, 11)
    slots.add("system", 100, ROOT, Kind.SYSTEM, 11)
    assert (slots["parting"].uses, slots["system"].uses) == (1, 0)
    slots.hit("system")
    assert slots["system"].uses == 1


def test_a_continued_answer_counts_as_unused_unless_others_use_it() -> None:
    slots = table()
    for key, hits in (("one", 1), ("two", 2)):
        slots.add(key, 100, ROOT, Kind.ANSWER, 11)
        for _ in range(hits):
            slots.hit(key)
        slots.supersede(key)
    assert slots["one"].uses == 0
    assert slots["two"].uses == 2


def test_removing_a_slot_ties_those_below_to_the_one_above() -> None:
    slots = table()
    slots.add("a", 100, ROOT, Kind.PROMPT, 11)
    slots.add("b", 200, ["a"], Kind.PROMPT, 11)
    slots.add("c", 300, ["a", "b"], Kind.PROMPT, 11)
    slots.remove("b")
    assert slots["c"].parent == "a"
    slots.remove("a")
    assert slots["c"].parent is None


@pytest.mark.parametrize("seed", range(5))
def test_the_slot_that_goes_is_the_one_that_the_rule_names(seed: int) -> None:
    """Random histories, beside the rule worked out slot by slot."""
    rng, slots = random.Random(seed), table(40)

    def value(slot: Slot) -> int:
        above = slots[slot.parent].position if slot.parent is not None else 0
        return ((slot.position - above) * (1 + slot.uses) << 20) // slot.blocks // (1 + slots._clock - slot.last)

    keys: list[int] = []
    for key in range(400):
        slots.add(
            key, 16 * rng.randrange(1, 500), rng.sample(keys, min(3, len(keys))), Kind.PROMPT, rng.randrange(11, 60)
        )
        keys.append(key)
        if rng.random() < 0.5:
            slots.hit(rng.choice(keys))
        if rng.random() < 0.1:
            slots.supersede(rng.choice(keys))
        idle = set(rng.sample(keys, -(-3 * len(keys) // 4))).__contains__
        for of_use in (False, True):
            values = [value(slots[k]) for k in keys if idle(k) and (slots[k].uses > 0) == of_use]
            victim = slots._least_value(of_use, idle)
            assert (victim is None) == (not values)
            assert victim is None or (value(slots[victim]), slots[victim].uses > 0) == (min(values), of_use)
        while slots.full:
            victim = slots.victim(idle, proven=True)
            slots.remove(victim)
            keys.remove(victim)
