"""The fused decode step, its slots and the prefill's way in and out of them, against the fp64 reference."""

import math
import random
from dataclasses import replace

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    NO_LIMIT,
    assert_precise,
    decode_plan,
    inside,
    ints,
    prefill_plan,
    randn,
    usual,
    worst,
)

from vllm_bamba.ops.mixer_step import StepWeights, mixer_step, sum_columns
from vllm_bamba.ops.mixer_step.reference import mixer_step_reference
from vllm_bamba.ops.slot_state import LayerSlots, empty_inputs, move_slots, read_slots, write_slots
from vllm_bamba.sharding import MixerShard
from vllm_bamba.state import EIGHT_BITS, FusedSlots, SlotFormat

HEADS, HEAD_DIM, STATE, WIDTH, REPLAY = 4, 16, 32, 4, 8
AS_TUNED = {"HEAD_DIM": 64, "STATE": 128}


def use_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Other ones than the module's."""
    for name, value in sizes.items():
        monkeypatch.setitem(globals(), name, value)


def slot_format(
    dtype: torch.dtype,
    state_dtype: torch.dtype | None = None,
    groups: int = 1,
    width: int = WIDTH,
    replay: int = REPLAY,
    anchored: bool = False,
    drafts: int = 0,
) -> SlotFormat:
    shard = MixerShard(HEADS, HEAD_DIM, groups, STATE)
    return SlotFormat(shard, width, dtype, state_dtype or dtype, replay, anchored, drafts)


class Batch:
    """Sequences in scattered slots of poisoned pages, and the same sequences in fp64 and in plain low precision."""

    def __init__(self, form: SlotFormat, slots: list[int], lengths: list[int], gated: bool = False, bias: bool = True):
        shard, dtype = form.shard, form.dtype
        self.form, self.slots, self.lengths, self.seed = form, slots, list(lengths), 10
        # of each row, from all steps: y and sums of squares; the kernel's, exact, plain
        self.seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in slots]
        # where both round at random, the largest error of the two is a matter of luck
        self.far = usual if form.state_dtype == torch.float8_e4m3fn else worst
        self.groups, channels = shard.groups, shard.local_conv_channels
        self.weights = StepWeights(
            taps=randn(1, form.width, channels, dtype=dtype, scale=0.5),
            conv_bias=randn(2, channels, dtype=dtype) if bias else None,
            A=-torch.linspace(0.02, 4.0, HEADS).bfloat16().float().to(DEVICE),
            D=randn(3, HEADS, dtype=dtype),
            dt_bias=randn(4, HEADS, dtype=dtype) - 1,
            norm=randn(5, shard.local_intermediate, dtype=dtype) if gated else None,
        )
        self.pages, self.fused = poisoned(form, 12)
        inputs = randn_rows(6, len(slots), channels, form.width - 1, dtype=dtype)
        states = randn_rows(7, len(slots), HEADS, HEAD_DIM, STATE, dtype=form.dtype).float()
        behind_padding = empty_inputs(self.fused, len(slots)).fill_(float("nan"))
        behind_padding[1:] = inputs
        write_slots(self.fused, ints(slots), ints(lengths), behind_padding, states, ints([*range(len(slots))]))
        self.exact = [(i.double(), s.double()) for i, s in zip(inputs, states, strict=True)]
        self.plain = [(i, stored(s, form)) for i, s in zip(inputs, states, strict=True)]

    def step(
        self,
        limit: tuple[float, float] = NO_LIMIT,
        tokens: list[int] | None = None,
        accepted: list[int] | None = None,
        poisonous: bool = False,
    ) -> torch.Tensor:
        """One token for each sequence; what comes out is compared in `check`.

        With drafts `tokens` of each, of which the first `accepted` stay; two more rows are nobody's. If drafts are
        `poisonous`, all that is not accepted is NaN, but for the time step.
        """
        counts = tokens or [1] * len(self.slots)
        size, inner = 2 * HEADS * HEAD_DIM + 2 * self.groups * STATE + HEADS, HEADS * HEAD_DIM
        self.seed += 1
        seeds = [self.seed + 10**6 * j for j in range(max(counts))]
        given = [randn_rows(seed, len(counts), size, dtype=self.form.dtype) for seed in seeds]
        stay = accepted or counts
        if poisonous:
            for row, count in enumerate(counts):
                for j in range(stay[row], count):
                    given[j][row, :-HEADS] = float("nan")
        packed = [given[j][row] for row, count in enumerate(counts) for j in range(count)]
        nobodys = [] if tokens is None else [torch.full_like(given[0][0], float("nan"))] * 2
        columns = inner + (sum_columns(HEADS) if self.weights.norm is not None else 0)
        out = torch.full((len(packed + nobodys), columns), float("nan"), dtype=self.form.dtype, device=DEVICE)
        out = inside(out)
        lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        plan = replace(decode_plan(self.slots, lengths, tokens), num_tokens=len(out))
        mixer_step(inside(torch.stack(packed + nobodys)), self.weights, limit, self.fused, plan, out)
        assert not out[len(packed) :].any()
        self.lengths = [length + new for length, new in zip(self.lengths, stay, strict=True)]
        results = iter(out)
        for row, count in enumerate(counts):
            if row == len(self.seen):
                self.seen.append(([], []))
            exact, plain = (list(of[row : row + 1]) for of in (self.exact, self.plain))  # after each token
            for j in range(count):
                result = next(results)
                if not self.slots[row]:
                    assert not result.any()
                if not self.slots[row] or (poisonous and j >= stay[row]):
                    continue
                y, square, state = self._reference(given[j][row].double(), exact[-1], limit)
                exact.append(state)
                plain_y, plain_square, (inputs, state) = self._reference(given[j][row], plain[-1], limit)
                plain.append((inputs, stored(state, self.form, 1000 * row + self.seed)))
                self.seen[row][0].append(torch.stack([result[:inner].double(), y, plain_y.double()]))
                sums = result[inner:].double().sum(), square, plain_square.double()
                self.seen[row][1].append(torch.stack(sums))
            if self.slots[row]:
                self.exact[row], self.plain[row] = exact[stay[row]], plain[stay[row]]
        return out

    def _reference(
        self, given: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor], limit: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        w, dtype = self.weights, given.dtype
        inputs, state = before
        parameters = [None if t is None else t.to(dtype) for t in (w.taps.T, w.conv_bias, w.A, w.D, w.dt_bias)]
        y, gated, inputs, state = mixer_step_reference(given, *parameters, limit, inputs, state.to(dtype), self.groups)
        out = y if w.norm is None else gated * w.norm.to(dtype)
        return out, gated.square().sum(), (inputs, state)

    def check(self) -> None:
        """All that came out so far, sequence by sequence, and the states: a single number may be exact by chance."""
        for row, seen in enumerate(self.seen):
            for what, values in zip(("y", "sum of squares"), seen, strict=True):
                if values and (what == "y" or self.weights.norm is not None):
                    ours, exact, plain = torch.stack(values, 1)
                    dtype = self.form.dtype if what == "y" else torch.float32
                    assert_precise(ours.to(dtype), exact, plain.to(dtype), f"{what} of row {row}", self.far)
        self.check_states()

    def check_states(self) -> None:
        """What a prefill would start from."""
        used = [row for row, slot in enumerate(self.slots) if slot]
        plan = prefill_plan([1] * len(used), [self.slots[row] for row in used], [self.lengths[row] for row in used])
        inputs = empty_inputs(self.fused, len(used))
        states = read_slots(self.fused, self.weights.A, plan, inputs)
        for i, row in enumerate(used):
            assert torch.equal(inputs[1 + i].double(), self.exact[row][0])
            assert_precise(states[i], self.exact[row][1], self.plain[row][1], f"state of row {row}", self.far)


def randn_rows(seed: int, rows: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are the same however many there are."""
    return torch.stack([randn(1000 * row + seed, *size, dtype=dtype) for row in range(rows)])


def stored(state: torch.Tensor, form: SlotFormat, seed: int = 0) -> torch.Tensor:
    """What plain code would keep of a state; 8 bits with a scale a row.

    e4m3 is rounded at random here too: to nearest, most changes of a few steps are lost, and with them their error.
    """
    if form.state_dtype == torch.int8:
        step = state.float().abs().amax(-1, keepdim=True) / 127
        return (state.float() / step).round() * step
    if form.state_dtype == torch.float8_e4m3fn:
        scale = state.float().abs().amax(-1, keepdim=True) / 448
        scaled = state.float() / scale
        steps = torch.exp2(torch.frexp(scaled).exponent.float() - 1).clamp(min=2**-6) / 8
        uniform = torch.rand(state.shape, generator=torch.Generator().manual_seed(seed)).to(state.device)
        return ((scaled / steps + uniform).floor() * steps).clamp(-448, 448) * scale
    return state.to(form.state_dtype)


def poisoned(form: SlotFormat, slots: int) -> tuple[torch.Tensor, FusedSlots]:
    """Pages as vLLM lays them out, all bytes 0xff: NaN in every floating-point dtype."""
    sizes = [
        torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(form.shapes(), form.dtypes(), strict=True)
    ]
    pages = torch.full((slots, sum(sizes) + 64), -1, dtype=torch.int8, device=DEVICE)
    conv, rest, _ = pages.split([*sizes, 64], 1)
    return pages, form.bind((conv.view(form.dtype).view(slots, *form.shapes()[0]), rest))


DTYPES_OF_STATES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
]
both_ways = pytest.mark.parametrize("replay", [0, REPLAY], ids=["without_ring", "replayed"])


@both_ways
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES_OF_STATES, ids=str)
def test_steps_are_the_reference_through_every_phase_of_the_ring(
    dtype: torch.dtype, state_dtype: torch.dtype, replay: int
) -> None:
    batch = Batch(slot_format(dtype, state_dtype, replay=replay), slots=[7, 2], lengths=[1, 30])
    for _ in range(REPLAY + 3):
        batch.step()
    batch.check()


@both_ways
def test_padded_rows_are_zero_and_touch_nothing(replay: int) -> None:
    batch = Batch(slot_format(torch.float32, replay=replay), slots=[7, 0, 2], lengths=[4, 4, 9], gated=True)
    before = batch.pages.clone()
    for _ in range(2):
        batch.step()
    others = [slot for slot in range(12) if slot not in (7, 2)]
    assert torch.equal(batch.pages[others], before[others])
    batch.check()


def run_with_drafts(batch: Batch, tokens: int, seed: int = 0, poisonous: bool = False) -> None:
    """Until each sequence has so many tokens more, with any number of drafts a step, any number of them accepted."""
    numbers = random.Random(seed)
    ends = [length + tokens for length in batch.lengths]
    used = [row for row, slot in enumerate(batch.slots) if slot]
    while any(batch.lengths[row] < ends[row] for row in used):
        counts = [numbers.randint(1, 1 + batch.form.drafts) if slot else 0 for slot in batch.slots]
        stay = [numbers.randint(1, count) if count else 0 for count in counts]
        batch.step(tokens=counts, accepted=stay, poisonous=poisonous)


@pytest.mark.parametrize(
    ("drafts", "replay", "dtype", "state_dtype"),
    [
        (1, 8, torch.float32, torch.float32),
        (4, 16, torch.float32, torch.float32),
        (3, 8, torch.bfloat16, torch.bfloat16),
        (2, 8, torch.bfloat16, torch.int8),
        (7, 16, torch.bfloat16, torch.float8_e4m3fn),
        (1, 8, torch.bfloat16, torch.float16),
        (4, 16, torch.bfloat16, torch.float32),
        (4, 32, torch.bfloat16, torch.int8),
        (8, 32, torch.bfloat16, torch.bfloat16),
        (8, 32, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_a_sequence_has_seen_what_was_accepted_in_every_phase_of_the_ring(
    drafts: int, replay: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    batch = Batch(slot_format(dtype, state_dtype, replay=replay, drafts=drafts), slots=[7, 2], lengths=[1, 30])
    for turn in range(32 // replay):
        run_with_drafts(batch, replay + 1, seed=turn)
        batch.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where an integer is made of NaN
@pytest.mark.parametrize(
    ("drafts", "replay", "dtype", "state_dtype"),
    [
        (2, 8, torch.float32, torch.float32),
        (4, 16, torch.float32, torch.float32),
        (4, 16, torch.bfloat16, torch.bfloat16),
        (2, 8, torch.bfloat16, torch.int8),
        (8, 32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_nothing_is_left_of_what_was_not_accepted(
    drafts: int, replay: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    batch = Batch(slot_format(dtype, state_dtype, replay=replay, drafts=drafts), slots=[7, 2], lengths=[1, 30])
    run_with_drafts(batch, 2 * replay, poisonous=True)
    batch.check()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_any_number_of_tokens_in_a_step(state_dtype: torch.dtype) -> None:
    """A row without any is left alone, as is its slot."""
    drafts = 4
    form = slot_format(torch.bfloat16, state_dtype, replay=16, drafts=drafts)
    batch = Batch(form, slots=[7, 5, 2], lengths=[1, 12, 30], gated=True)
    idle = batch.pages[5].clone()
    for count in range(1, drafts + 2):
        batch.step(tokens=[count, 0, drafts + 2 - count])
    assert torch.equal(batch.pages[5], idle)
    batch.step(tokens=[0, drafts + 1, 0])
    batch.check()


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "state", "replay", "drafts", "state_dtype"),
    [
        (12, 2, 64, 16, 16, 6, torch.bfloat16),
        (4, 1, 64, 128, 16, 4, torch.bfloat16),
        (4, 1, 64, 128, 16, 4, torch.int8),
        (6, 2, 16, 16, 32, 4, torch.int8),
    ],
    ids=["two_folds_of_two_parts_each", "as_tuned", "int8_as_tuned", "int8_narrow"],
)
def test_drafts_in_other_sizes(
    heads: int,
    groups: int,
    head_dim: int,
    state: int,
    replay: int,
    drafts: int,
    state_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_sizes(monkeypatch, HEADS=heads, HEAD_DIM=head_dim, STATE=state)
    form = slot_format(torch.bfloat16, state_dtype, groups=groups, replay=replay, drafts=drafts)
    batch = Batch(form, slots=[7, 2], lengths=[1, 30], gated=True)
    run_with_drafts(batch, replay)
    batch.check()


@pytest.mark.parametrize("width", [2, 3, 4])
def test_drafts_of_shorter_convolutions_in_groups_with_padding(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six heads those whose rings are full are not the same number in each step."""
    use_sizes(monkeypatch, HEADS=6)
    form = slot_format(torch.bfloat16, torch.bfloat16, groups=2, width=width, drafts=2)
    batch = Batch(form, slots=[7, 0, 2], lengths=[1, 5, 30], gated=True, bias=False)
    before = batch.pages.clone()
    run_with_drafts(batch, REPLAY + 1)
    batch.check()
    others = [slot for slot in range(12) if slot not in (7, 2)]
    assert torch.equal(batch.pages[others], before[others])


def test_a_prefill_goes_on_behind_drafts_and_drafts_behind_it() -> None:
    batch = Batch(slot_format(torch.float32, drafts=2), slots=[7, 2], lengths=[1, 30])
    for turn in range(3):
        run_with_drafts(batch, 3, seed=turn)
        inputs, plan = empty_inputs(batch.fused, 2), prefill_plan([1, 1], batch.slots, batch.lengths)
        states = read_slots(batch.fused, batch.weights.A, plan, inputs)
        write_slots(batch.fused, ints(batch.slots), ints(batch.lengths), inputs, states, ints([0, 1]))
    run_with_drafts(batch, REPLAY)
    batch.check()


@pytest.mark.parametrize(
    ("form", "tokens", "message"),
    [
        ({"drafts": 2}, None, "a plan with other drafts"),
        ({}, [1], "a plan with other drafts"),
        ({"drafts": 4}, [1], "cannot be taken back from a ring of 8"),
        ({"drafts": 1, "replay": 0}, [1], "cannot be taken back from a ring of 0"),
        ({"drafts": 1, "anchored": True}, [1], "behind an anchor"),
    ],
)
def test_drafts_that_cannot_be_taken_back_are_refused(
    form: dict[str, int], tokens: list[int] | None, message: str
) -> None:
    batch = Batch(slot_format(torch.float32, **form), slots=[7], lengths=[3])  # type: ignore[arg-type]
    given, out = randn(1, 1, 2 * HEADS * HEAD_DIM + 2 * STATE + HEADS), randn(2, 1, HEADS * HEAD_DIM)
    with pytest.raises(ValueError, match=message):
        mixer_step(given, batch.weights, NO_LIMIT, batch.fused, decode_plan([7], [4], tokens), out)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_the_norms_weight_and_the_sum_of_squares(dtype: torch.dtype, replay: int) -> None:
    batch = Batch(slot_format(dtype, replay=replay), slots=[7, 2], lengths=[1, 30], gated=True)
    for _ in range(4):
        batch.step()
    batch.check()


@both_ways
@pytest.mark.parametrize("groups", [2, 4])
def test_each_group_of_heads_has_its_own_b_and_c(groups: int, replay: int) -> None:
    batch = Batch(slot_format(torch.float32, groups=groups, replay=replay), slots=[7, 2], lengths=[1, 30])
    for _ in range(3):
        batch.step()
    batch.check()


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "state", "replay", "state_dtype"),
    [
        (6, 2, 16, 32, REPLAY, torch.bfloat16),
        (12, 1, 64, 16, REPLAY, torch.bfloat16),
        (72, 1, 16, 16, 16, torch.bfloat16),
        (4, 1, 64, 128, 16, torch.bfloat16),
        (4, 1, 64, 128, 16, torch.int8),
        (6, 2, 16, 16, 32, torch.int8),
    ],
    ids=[
        "three_heads_a_group",
        "two_folds_of_two_parts_each",
        "two_blocks_of_heads",
        "as_tuned",
        "int8_as_tuned",
        "int8_narrow",
    ],
)
def test_other_sizes(
    heads: int,
    groups: int,
    head_dim: int,
    state: int,
    replay: int,
    state_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_sizes(monkeypatch, HEADS=heads, HEAD_DIM=head_dim, STATE=state)
    form = slot_format(torch.bfloat16, state_dtype, groups=groups, replay=replay)
    batch = Batch(form, slots=[7, 2], lengths=[1, 30], gated=True)
    for _ in range(replay + 2):
        batch.step()
    batch.check()


@pytest.mark.parametrize("width", [2, 3])
def test_shorter_convolutions_without_a_bias(width: int) -> None:
    batch = Batch(slot_format(torch.float32, width=width), slots=[7, 2], lengths=[1, 30], bias=False)
    for _ in range(width + 1):
        batch.step()
    batch.check()


@both_ways
def test_time_steps_are_clamped_to_the_limit(replay: int) -> None:
    batch = Batch(slot_format(torch.float32, replay=replay), slots=[7, 2], lengths=[1, 30])
    for _ in range(3):
        batch.step(limit=(0.2, 0.4))
    batch.check()


def test_small_time_steps_keep_their_relative_precision() -> None:
    """log(1 + exp(x)) as it stands is 0 below -17, and a head that never writes never learns."""
    batch = Batch(slot_format(torch.float32, replay=0), slots=[7], lengths=[5])
    batch.weights.dt_bias.fill_(-20)
    plan, inputs = prefill_plan([1], [7], [5]), empty_inputs(batch.fused, 1)
    states = read_slots(batch.fused, batch.weights.A, plan, inputs)
    write_slots(batch.fused, ints([7]), ints([5]), inputs, torch.zeros_like(states), ints([0]))
    batch.exact[0] = batch.exact[0][0], torch.zeros_like(batch.exact[0][1])
    batch.plain[0] = batch.plain[0][0], torch.zeros_like(batch.plain[0][1])
    batch.step()
    state = read_slots(batch.fused, batch.weights.A, plan, inputs)[0].double()
    assert batch.exact[0][1].abs().max() > 0
    torch.testing.assert_close(state, batch.exact[0][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, *EIGHT_BITS.values()], ids=str)
def test_heads_that_hardly_decay_drift_no_more_than_in_plain_code(state_dtype: torch.dtype) -> None:
    batch = Batch(slot_format(torch.bfloat16, state_dtype), slots=[7], lengths=[1])
    batch.weights.A.fill_(-(2.0**-10))
    for _ in range(4000 if DEVICE.type == "cuda" else 100):
        batch.step()
    batch.check()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_copied_slot_goes_on_as_the_original(state_dtype: torch.dtype) -> None:
    """A slot can be published after any token: its bytes are all there is to it."""
    batch = Batch(slot_format(torch.bfloat16, state_dtype), slots=[7], lengths=[3])
    for _ in range(REPLAY // 2):
        batch.step()
    batch.pages[5] = batch.pages[7]
    for of_rows, copy in ((batch.slots, 5), (batch.lengths, batch.lengths[0]), (batch.exact, batch.exact[0])):
        of_rows.append(copy)
    batch.plain.append(batch.plain[0])
    for _ in range(REPLAY):
        batch.step()
    batch.check()


def layers_of(*batches: Batch) -> tuple[LayerSlots, list[torch.Tensor]]:
    """Batches as layers, each of a group of its own, and the tables: their slots, then others, then theirs again."""
    tables = [ints([[slot, i + 1, slot] for i, slot in enumerate(b.slots)]) for b in batches]
    fused, A = [b.fused for b in batches], [b.weights.A for b in batches]
    return LayerSlots.of(fused, A, list(range(len(batches))), tables), tables


@pytest.mark.parametrize("stays", [False, True], ids=["moved", "in_place"])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES_OF_STATES, ids=str)
def test_anchored_slots_are_folded_where_sequences_go_on_in_another_slot_or_in_the_same(
    dtype: torch.dtype, state_dtype: torch.dtype, stays: bool
) -> None:
    form = slot_format(dtype, state_dtype, groups=2, anchored=True)
    first, second = Batch(form, slots=[7, 11], lengths=[3, 8]), Batch(form, slots=[10, 8], lengths=[3, 8])
    second.weights.A.mul_(0.5)
    second.seed += 100
    layers, _tables = layers_of(first, second)
    for batch in (first, second):
        for _ in range(REPLAY):
            batch.step()
    left = [batch.pages.clone() for batch in (first, second)]
    column = 2 if stays else 1
    move_slots(layers, ints([[1, first.lengths[1], 0, column], [0, first.lengths[0], 0, column]]))
    for batch, before in zip((first, second), left, strict=True):
        if not stays:
            batch.slots[:] = [1, 2]
        batch.check_states()
        others = [slot for slot in range(12) if slot not in batch.slots]
        assert torch.equal(batch.pages[others], before[others])
        assert not batch.fused.ring_dt[batch.slots].any()
        for _ in range(REPLAY):
            batch.step()
        batch.check()


@pytest.mark.parametrize(("more", "width"), [*((more, WIDTH) for more in (0, 1, 3, REPLAY)), (3, 2)])
def test_what_a_sequence_had_at_its_anchor_is_found_when_it_has_gone_on(more: int, width: int) -> None:
    """It is one of two ways in which a slot is found: the other is that the sequence ended where its ring was full."""
    batch = Batch(slot_format(torch.bfloat16, width=width, anchored=True), slots=[7], lengths=[3])
    layers, _tables = layers_of(batch)
    for _ in range(REPLAY):
        batch.step()
    move_slots(layers, ints([[0, batch.lengths[0], 0, 2]]))
    found = batch.lengths[0], batch.exact[0], batch.plain[0]
    for _ in range(more):
        batch.step()
    batch.check()
    for length, exact, plain in {more: (batch.lengths[0], batch.exact[0], batch.plain[0]), 0: found}.values():
        move_slots(layers, ints([[0, length, 0, 1]]))
        batch.slots[0], batch.lengths[0], batch.exact[0], batch.plain[0] = 1, length, exact, plain
        batch.check_states()
        for _ in range(3):
            batch.step()
        batch.check()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_state_without_tokens_in_its_ring_is_moved_bit_by_bit(state_dtype: torch.dtype) -> None:
    batch = Batch(slot_format(torch.bfloat16, state_dtype, anchored=True), slots=[7], lengths=[30])
    layers, _tables = layers_of(batch)
    move_slots(layers, ints([[0, 30, 0, 1]]))
    for name in ("ssm", "scale", "anchor_conv"):
        tensor = getattr(batch.fused, name)
        if tensor is not None:
            assert torch.equal(tensor[1].view(torch.int8), tensor[7].view(torch.int8))


def test_layers_whose_slots_differ_are_not_moved_together() -> None:
    first, second = (Batch(slot_format(torch.float32, width=width), [7], [3]) for width in (4, 3))
    with pytest.raises(ValueError, match="not laid out alike"):
        layers_of(first, second)


@both_ways
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_sequence_gives_the_same_bits_in_any_slot_and_any_batch(
    state_dtype: torch.dtype, replay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sizes(monkeypatch, **AS_TUNED)
    form = slot_format(torch.bfloat16, state_dtype, replay=replay)
    alone, among = Batch(form, slots=[7], lengths=[3]), Batch(form, slots=[2, 9, 0], lengths=[3, 5, 4])
    for _ in range(REPLAY + 1):
        assert torch.equal(alone.step()[0], among.step()[0])
    size = alone.pages.shape[1] - 64
    assert torch.equal(alone.pages[7, :size], among.pages[2, :size])


@pytest.mark.gpu
@pytest.mark.parametrize("anchored", [False, True], ids=["folding", "anchored"])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_starting_early_changes_no_bits(
    state_dtype: torch.dtype, anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers between products, in one CUDA graph whose buffers share memory: what is read too soon is another's."""
    use_sizes(monkeypatch, **AS_TUNED)
    form = slot_format(torch.bfloat16, state_dtype, replay=16, anchored=anchored)
    rows, inner, columns = 33, HEADS * HEAD_DIM, 2 * HEADS * HEAD_DIM + 2 * STATE + HEADS
    weights = Batch(form, slots=[1], lengths=[1], gated=True).weights
    into = [randn(20 + layer, columns, 512, dtype=torch.bfloat16, scale=512**-0.5) for layer in range(3)]
    back = [randn(30 + layer, 512, inner, dtype=torch.bfloat16, scale=inner**-0.5) for layer in range(3)]
    start = randn(40, rows, 512, dtype=torch.bfloat16)
    checkpoints = [
        randn(50 + layer, rows + 1, HEADS, HEAD_DIM, STATE, scale=20.0).to(state_dtype) for layer in range(3)
    ]
    plan = decode_plan([*range(1, rows), 0], [32] * rows)

    def run(early: bool) -> torch.Tensor:
        monkeypatch.setattr("vllm_bamba.ops.mixer_step.starts_early", lambda device: early)
        layers = [form.empty(rows + 1, DEVICE) for _ in checkpoints]
        seen = torch.empty(15 if anchored else 40, rows, 512, dtype=torch.bfloat16, device=DEVICE)

        def reset() -> None:
            for slots, checkpoint in zip(layers, checkpoints, strict=True):
                for tensor in slots.tensors:
                    if tensor is not None:
                        tensor.zero_()
                slots.ssm.copy_(checkpoint)
                if slots.scale is not None:
                    slots.scale.fill_(0.05)
            plan.lengths.fill_(32)

        def steps() -> None:
            x = start
            for step in seen:
                plan.lengths.add_(1)
                for slots, first, second in zip(layers, into, back, strict=True):
                    out = x.new_empty(rows, inner + sum_columns(HEADS))
                    mixer_step(x @ first.t(), weights, NO_LIMIT, slots, plan, out)
                    x = torch.nn.functional.rms_norm(out[:, :inner] @ second.t(), (512,))
                step.copy_(x)

        reset()
        steps()
        eager = seen.clone()
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps()
        graph.replay()
        assert torch.equal(seen, eager)
        return eager

    late = run(early=False)
    assert late[:, :-1].isfinite().all()
    assert late.unique(dim=0).shape == late.shape
    assert torch.equal(run(early=True), late)


@pytest.mark.parametrize(
    ("dtype", "largest", "value", "step"),
    [
        (torch.int8, 127, 0.3, 1),
        (torch.float8_e4m3fn, 448, 0.3, 2**-5),
        (torch.float8_e4m3fn, 448, -0.001, 2**-9),
        (torch.float8_e4m3fn, 448, 443.0, 32),
    ],
)
def test_rounding_to_8_bits_keeps_the_mean(dtype: torch.dtype, largest: int, value: float, step: float) -> None:
    """Rounded to nearest, a state would never leave a value that its decay moves by less than half a step."""
    form = slot_format(torch.float32, dtype, replay=0)
    _, fused = poisoned(form, 200)
    states = torch.full((1, HEADS, HEAD_DIM, STATE), value, device=DEVICE)
    states[..., 0] = largest
    slots = list(range(1, 200))
    lengths = ints([1 + n for n in range(199)])
    write_slots(fused, ints(slots), lengths, empty_inputs(fused, 199).zero_(), states, ints([0] * 199))
    assert torch.equal(fused.scale[1:], torch.ones_like(fused.scale[1:]))
    assert (fused.ssm[1:, ..., 0].float() == largest).all()
    steps = fused.ssm[1:, ..., 1:].double() / step
    below = math.floor(value / step)
    assert set(steps.unique().tolist()) == {below, below + 1}
    share = value / step - below
    assert abs(steps.mean().item() - below - share) <= 5 * (share * (1 - share) / steps.numel()) ** 0.5  # 5 deviations


def test_shapes_that_do_not_fit_are_refused() -> None:
    batch = Batch(slot_format(torch.float32), slots=[7], lengths=[3])
    with pytest.raises(ValueError, match="do not fit slots of 4 heads x 16 x 32"):
        mixer_step(randn(1, 1, 100), batch.weights, NO_LIMIT, batch.fused, decode_plan([7], [4]), randn(2, 1, 64))
