"""Short prefills' description at fixed addresses, and what graphs make of it."""

import contextlib
from collections.abc import Sequence

import pytest
import torch
from helpers import CHUNK, DEVICE, NO_LIMIT, inside, prefill_plan, randn

from vllm_bamba import prefill_graphs
from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill
from vllm_bamba.ops.ssd_prefill import ssd_prefill
from vllm_bamba.prefill_graphs import (
    CONV_BLOCK,
    MOST,
    NOTHING,
    SHAPES,
    GroupPrefills,
    PrefillGraphs,
    Run,
    Shape,
    ShortPrefills,
    shape_for,
)
from vllm_bamba.state import InnerStates, PrefillPlan

HEADS, HEAD_DIM, STATE, WIDTH = 4, 16, 32, 4
CHANNELS = HEADS * HEAD_DIM + 2 * STATE
SLOTS, INNER = (5, 7, 1, 9), (3, 2, 8, 6)  # of each sequence, and of the state inside of it
SOME = Shape(4, 128)

BATCHES = [
    *([Run(*run)] for run in (
        (0, 1), (0, 5), (5, 1), (0, CHUNK), (0, CHUNK + 1, CHUNK), (3, 2 * CHUNK, 16), (7, 40, 25), (CHUNK, 31, 16),
        (2 * CHUNK - 1, 64, 1), (0, 64, 48),
    )),
    [Run(0, 40, 32), Run(7, 20)],
    [Run(CHUNK - 1, 2, 1), Run(0, 1), Run(3, CHUNK, 13)],
    [Run(1, 31, 15), Run(0, 33), Run(2 * CHUNK, 1), Run(CHUNK + 5, 60, 11)],
]  # fmt: skip


def described(runs: Sequence[Run]) -> ShortPrefills:
    made = ShortPrefills(CHUNK, DEVICE, SOME)
    made.fill([Run(5, 60, 21), Run(1, 8, 3), Run(0, 60)])  # what was before must not show
    made.fill(runs)
    return made


def slots(runs: Sequence[Run], sequences: int = SOME.sequences) -> torch.Tensor:
    made = torch.zeros(2, sequences, dtype=torch.int32, device=DEVICE)
    for i, run in enumerate(runs):
        made[:, i] = torch.tensor([SLOTS[i], INNER[i] if run.inner else 0])
    return made


def plan_of(runs: Sequence[Run]) -> PrefillPlan:
    """What the metadata's builder says of them elsewhere."""
    inner = {i: (run.inner, INNER[i]) for i, run in enumerate(runs) if run.inner}
    return prefill_plan([run.tokens for run in runs], [*SLOTS[: len(runs)]], [run.start for run in runs], inner=inner)


@pytest.mark.parametrize("runs", BATCHES, ids=str)
def test_it_says_what_a_plan_of_the_sequences_says(runs: list[Run]) -> None:
    plan, expected, there = described(runs).plan(SOME, slots(runs)), plan_of(runs), len(runs)
    tokens = expected.num_tokens
    for name in ("slots", "lengths", "query_start_loc", "continues", "last_chunk"):
        ours, theirs = getattr(plan, name), getattr(expected, name)
        assert torch.equal(ours[: len(theirs)], theirs), name
    assert not plan.slots[there:].any()
    assert (plan.query_start_loc[there:] == tokens).all()  # sequences of no tokens
    assert not plan.continues[there:].any()
    assert (plan.last_chunk[there:] == expected.last_chunk[-1]).all()  # and of no chunks
    chunks = len(expected.chunk_sequence)
    assert torch.equal(plan.chunk_start_loc[: chunks + 1], expected.chunk_start_loc)
    assert (plan.chunk_start_loc[chunks:] == tokens).all()  # chunks of nothing
    assert torch.equal(plan.chunk_sequence[:chunks], expected.chunk_sequence)
    assert (plan.chunk_sequence[chunks:] == there - 1).all()
    assert len(plan.chunk_sequence) == len(plan.chunk_start_loc) - 1
    assert isinstance(plan.inner, InnerStates)
    assert isinstance(expected.inner, InnerStates)
    assert torch.equal(plan.inner.slots[:there], expected.inner.slots)
    assert not plan.inner.slots[there:].any()
    kept = expected.inner.slots > 0
    for name in ("lengths", "inputs", "chunks"):
        ours, theirs = getattr(plan.inner, name)[:there], getattr(expected.inner, name)
        assert torch.equal(ours[kept], theirs[kept].to(torch.int32)), name
    blocks = [range(-(-run.tokens // CONV_BLOCK)) for run in runs]
    sequences = [i for i, of_run in enumerate(blocks) for _ in of_run]
    places = [place for of_run in blocks for place in of_run]
    programs = plan.conv_metadata.nums_dict[CONV_BLOCK]["tot"]
    assert plan.conv_metadata.batch_ptr.tolist() == sequences + [NOTHING] * (programs - len(sequences))
    assert plan.conv_metadata.token_chunk_offset_ptr[: len(places)].tolist() == places


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_every_batch_fits(sequences: int) -> None:
    """As many chunks and blocks as there can be, wherever sequences start and states inside of them stand."""
    most = Shape(sequences, 2 * CHUNK)
    made = ShortPrefills(CHUNK, DEVICE, most)
    chunks, programs = [], []
    for start in range(CHUNK):
        for inner in range(2 * CHUNK - sequences):
            few = [Run(CHUNK - 1, 3, 2), Run(CHUNK - 1, 1)][: sequences - 1]
            last = 2 * CHUNK - sum(run.tokens for run in few)
            made.fill([*few, Run(start, last, min(inner, last - 1))])
            plan = made.plan(most, slots([], sequences))
            assert plan.chunk_start_loc[-1] == 2 * CHUNK
            chunks.append(int((plan.chunk_start_loc < 2 * CHUNK).sum()))
            programs.append(int((plan.conv_metadata.batch_ptr != NOTHING).sum()))
    assert max(programs) <= len(plan.conv_metadata.batch_ptr)
    assert max(chunks) <= len(plan.chunk_sequence)


def test_the_smallest_graph_that_takes_a_batch_is_used() -> None:
    assert shape_for(1, 1) == (1, 32)
    assert shape_for(1, 33) == (1, 64)
    assert shape_for(2, 33) == (4, 256)
    assert shape_for(4, 257) == (4, 1024)
    assert shape_for(5, 1) == (8, 512)
    assert shape_for(8, 2048) == MOST == SHAPES[-1]
    assert shape_for(9, 9) is shape_for(1, 2049) is shape_for(0, 0) is None


class Layer:
    """The part of a mixer that a graph holds, over slots of its own."""

    def __init__(self) -> None:
        self.conv = randn(1, 10, CHANNELS, WIDTH - 1)
        self.ssm = randn(2, 10, HEADS, HEAD_DIM, STATE)
        self.weight, self.bias = randn(3, CHANNELS, WIDTH, scale=0.5), randn(4, CHANNELS)
        self.of_heads = -torch.linspace(0.3, 9.0, HEADS, device=DEVICE), randn(5, HEADS), randn(6, HEADS) - 2

    def prefill(self, projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        xBC, dt = projected.split([CHANNELS, HEADS], dim=1)
        xBC = causal_conv1d_prefill(xBC, self.weight, self.bias, self.conv, plan)
        x, B, C = xBC.split([HEADS * HEAD_DIM, STATE, STATE], dim=1)
        A, D, dt_bias = self.of_heads
        heads, groups = (HEADS, HEAD_DIM), (1, STATE)
        given = (x.unflatten(1, heads), dt, A, B.unflatten(1, groups), C.unflatten(1, groups), D, dt_bias)
        ssd_prefill(*given, NO_LIMIT, self.ssm, plan, output.view(len(output), *heads))


@pytest.mark.gpu
def test_graphs_do_what_the_layer_does() -> None:
    torch.cuda.init()
    plain, graphed = Layer(), Layer()
    short = GroupPrefills(ShortPrefills(CHUNK, DEVICE), slots([], MOST.sequences))
    graphs = PrefillGraphs(graphed.prefill)
    longer = MOST.tokens + 1
    given, output = randn(7, longer, CHANNELS + HEADS), torch.empty(longer, HEADS * HEAD_DIM, device=DEVICE)
    before = graphed.conv.clone(), graphed.ssm.clone()
    assert graphs.capture(given, output, short, graphed.ssm)
    assert not graphs.capture(given, output, short, graphed.ssm)
    graphed.conv.copy_(before[0]), graphed.ssm.copy_(before[1])
    longer_ones = [[Run(9, 300, 290)], [Run(0, MOST.tokens, 496)], [Run(700, 33, 16), Run(0, 700, 16), Run(1, 900)]]
    for runs in [*BATCHES, *longer_ones]:
        short.slots.copy_(slots(runs, MOST.sequences))
        short.prefills.fill(runs)
        whole = plan_of(runs)
        made = torch.full((whole.num_tokens, HEADS * HEAD_DIM), float("nan"), device=DEVICE)
        assert graphs.run(inside(given[: len(made)]), len(runs), short, graphed.ssm, made)
        expected = torch.empty_like(made)
        plain.prefill(inside(given[: len(made)]), whole, expected)
        torch.testing.assert_close(made, expected)
        for ours, theirs in ((graphed.conv, plain.conv), (graphed.ssm, plain.ssm)):
            torch.testing.assert_close(ours[1:], theirs[1:])


class Recorded:
    """What `torch.cuda.CUDAGraph` does: a call that is noted down and done again."""

    capturing: "Recorded | None" = None

    def capture_begin(self, **options: object) -> None:
        self.calls: list[tuple[object, ...]] = []
        Recorded.capturing = self

    def capture_end(self) -> None:
        Recorded.capturing = None

    def replay(self) -> None:
        for function, *given in self.calls:
            function(*given)


class NoStream:
    def wait_stream(self, other: object) -> None:
        pass


def test_graphs_are_made_once_for_each_place_of_states_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: which graph runs on what, and when graphs are made anew."""
    cuda = prefill_graphs.torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(cuda, "current_stream", NoStream)
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(prefill_graphs, "_shared_pool", lambda device: (None, NoStream()))
    seen: list[tuple[int, list[int]]] = []

    def work(projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        seen.append((len(projected), plan.slots.tolist()))
        output.copy_(2 * projected)

    def prefill(projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        if Recorded.capturing is not None:
            Recorded.capturing.calls.append((work, projected, plan, output))
        else:
            work(projected, plan, output)

    state, moved, longer = torch.zeros(3), torch.zeros(3), MOST.tokens + 1
    of_all = torch.ones(2, MOST.sequences, dtype=torch.int32)
    short = GroupPrefills(ShortPrefills(CHUNK, torch.device("cpu")), of_all)
    given, output, graphs = torch.randn(longer, 6), torch.zeros(longer, 6), PrefillGraphs(prefill)
    assert not graphs.made
    assert not graphs.run(given[:5], 1, short, state, output[:5])
    assert graphs.capture(given, output, short, state)
    assert graphs.made
    assert seen == [(shape.tokens, [0] * shape.sequences) for shape in reversed(SHAPES)]  # on nobody's slots
    assert not graphs.capture(given, output, short, state)
    seen.clear()
    for sequences, tokens, size in ((1, 1, 32), (1, 33, 64), (2, 33, 256), (8, 513, 2048)):
        of_all[0] = tokens
        output.zero_()
        assert graphs.run(given[:tokens], sequences, short, state, output[:tokens])
        rows, on = seen.pop()
        assert rows == size
        assert set(on) == {tokens}
        assert len(on) >= sequences
        assert torch.equal(output[:tokens], 2 * given[:tokens])
        assert not output[tokens:].any()
    assert not graphs.run(given, 1, short, state, output)  # longer than any
    assert not graphs.run(given[:9], MOST.sequences + 1, short, state, output[:9])
    assert not graphs.run(given[:5], 1, short._replace(slots=of_all.clone()), state, output[:5])
    assert not graphs.run(given[:5], 1, short, moved, output[:5])
    assert graphs.capture(given, output, short, moved)
    assert graphs.run(given[:5], 1, short, moved, output[:5])
    assert not graphs.run(given[:5], 1, short, state, output[:5])
