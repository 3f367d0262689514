"""A lone prefill's description at fixed addresses, and what graphs make of it."""

import contextlib

import pytest
import torch
from helpers import CHUNK, DEVICE, NO_LIMIT, inside, prefill_plan, randn

from vllm_bamba import prefill_graphs
from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill
from vllm_bamba.ops.ssd_prefill import ssd_prefill
from vllm_bamba.prefill_graphs import CONV_BLOCK, NOTHING, SIZES, LonePrefill, PrefillGraphs
from vllm_bamba.state import InnerStates, PrefillPlan

HEADS, HEAD_DIM, STATE, WIDTH = 4, 16, 32, 4
CHANNELS = HEADS * HEAD_DIM + 2 * STATE
SLOTS, INNER = 5, 3

# tokens that came before, new ones, of these before the inner state
SEQUENCES = [
    (0, 1, 0), (0, 5, 0), (5, 1, 0), (0, CHUNK, 0), (0, CHUNK + 1, CHUNK), (3, 2 * CHUNK, 16), (7, 40, 25),
    (CHUNK, 31, 16), (2 * CHUNK - 1, 64, 1), (0, 64, 48),
]  # fmt: skip


def lone(start: int, tokens: int, inner: int) -> LonePrefill:
    made = LonePrefill(CHUNK, DEVICE, most=64)
    made.fill(5, 60, 21)  # what was before must not show
    made.fill(start, tokens, inner)
    return made


def slots(inner: int) -> torch.Tensor:
    return torch.tensor([SLOTS, INNER if inner else 0], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("start", "tokens", "inner"), SEQUENCES)
def test_it_says_what_a_plan_of_the_sequence_says(start: int, tokens: int, inner: int) -> None:
    plan = lone(start, tokens, inner).plan(64, slots(inner))
    expected = prefill_plan([tokens], [SLOTS], [start], inner={0: (inner, INNER)} if inner else {})
    for name in ("slots", "lengths", "query_start_loc", "continues", "last_chunk"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    chunks = len(expected.chunk_start_loc)
    assert torch.equal(plan.chunk_start_loc[:chunks], expected.chunk_start_loc)
    assert (plan.chunk_start_loc[chunks:] == tokens).all()  # chunks of nothing
    assert len(plan.chunk_sequence) == len(plan.chunk_start_loc) - 1
    assert not plan.chunk_sequence.any()
    assert isinstance(plan.inner, InnerStates)
    assert isinstance(expected.inner, InnerStates)
    assert torch.equal(plan.inner.slots, expected.inner.slots)
    if inner:
        for name in ("lengths", "inputs", "chunks"):
            assert torch.equal(getattr(plan.inner, name), getattr(expected.inner, name).to(torch.int32)), name
    programs = -(-tokens // CONV_BLOCK)
    assert plan.conv_metadata.batch_ptr.tolist() == [0] * programs + [NOTHING] * (64 // CONV_BLOCK - programs)


def test_every_prefill_fits() -> None:
    """As many chunks as there can be, wherever the sequence starts and the inner state stands."""
    made = LonePrefill(CHUNK, DEVICE, most=2 * CHUNK)
    for start in range(CHUNK):
        for inner in range(2 * CHUNK):
            made.fill(start, 2 * CHUNK, inner)
            plan = made.plan(2 * CHUNK, slots(inner))
            assert plan.chunk_start_loc[-1] == 2 * CHUNK


class Layer:
    """The part of a mixer that a graph holds, over slots of its own."""

    def __init__(self) -> None:
        self.conv = randn(1, 8, CHANNELS, WIDTH - 1)
        self.ssm = randn(2, 8, HEADS, HEAD_DIM, STATE)
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
    of_all = slots(0)
    plan, graphs = LonePrefill(CHUNK, DEVICE), PrefillGraphs(graphed.prefill)
    longer = SIZES[-1] + 1
    given, output = randn(7, longer, CHANNELS + HEADS), torch.empty(longer, HEADS * HEAD_DIM, device=DEVICE)
    before = graphed.conv.clone(), graphed.ssm.clone()
    assert graphs.capture(given, output, plan, of_all, graphed.ssm)
    assert not graphs.capture(given, output, plan, of_all, graphed.ssm)
    graphed.conv.copy_(before[0]), graphed.ssm.copy_(before[1])
    for start, tokens, inner in [*SEQUENCES, (9, 300, 290), (0, SIZES[-1], 496), (700, 33, 16)]:
        of_all.copy_(slots(inner))
        plan.fill(start, tokens, inner)
        made = torch.full((tokens, HEADS * HEAD_DIM), float("nan"), device=DEVICE)
        assert graphs.run(inside(given[:tokens]), of_all, graphed.ssm, made)
        expected = torch.empty_like(made)
        whole = prefill_plan([tokens], [SLOTS], [start], inner={0: (inner, INNER)} if inner else None)
        plain.prefill(inside(given[:tokens]), whole, expected)
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

    state, moved, of_all, plan = (
        torch.zeros(3),
        torch.zeros(3),
        slots(INNER).cpu(),
        LonePrefill(CHUNK, torch.device("cpu")),
    )
    given, output, graphs = torch.randn(SIZES[-1] + 1, 6), torch.zeros(SIZES[-1] + 1, 6), PrefillGraphs(prefill)
    assert not graphs.made
    assert not graphs.run(given[:5], of_all, state, output[:5])
    assert graphs.capture(given, output, plan, of_all, state)
    assert graphs.made
    assert seen == [(size, [0]) for size in SIZES]  # tried out on nobody's slots
    assert not graphs.capture(given, output, plan, of_all, state)
    seen.clear()
    for tokens, size in ((1, 32), (32, 32), (33, 64), (1024, 1024)):
        of_all.copy_(torch.tensor([tokens, 0]))
        output.zero_()
        assert graphs.run(given[:tokens], of_all, state, output[:tokens])
        assert seen.pop() == (size, [tokens])
        assert torch.equal(output[:tokens], 2 * given[:tokens])
        assert not output[tokens:].any()
    assert not graphs.run(given, of_all, state, output)  # longer than any
    assert not graphs.run(given[:5], of_all.clone(), state, output[:5])
    assert not graphs.run(given[:5], of_all, moved, output[:5])
    assert graphs.capture(given, output, plan, of_all, moved)
    assert graphs.run(given[:5], of_all, moved, output[:5])
    assert not graphs.run(given[:5], of_all, state, output[:5])
