"""The recurrence over prompts against its reference, the reference against Transformers' chunked form."""

import dataclasses
import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    CHUNK,
    DEVICE,
    DTYPES,
    NO_LIMIT,
    Recorder,
    Slots,
    as_on_a_gpu,
    assert_precise,
    chunk_lengths,
    decode_plan,
    inside,
    prefill_plan,
    product_dtype,
    randn,
)
from transformers.models.bamba import modeling_bamba
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadataBuilder

from vllm_bamba.compat import autotuned_kernels, fix_launches
from vllm_bamba.ops.ssd_prefill import kernels, ssd_prefill, tuning
from vllm_bamba.ops.ssd_prefill.reference import ssd_prefill_reference
from vllm_bamba.ops.ssm_step import ssm_step
from vllm_bamba.state import PrefillPlan

HEADS = 4
SMALL, NINE_B = (16, 32, CHUNK), (64, 128, 256)  # head_dim, state, chunk size
HEAD_DIM, STATE, _ = SMALL
LIMIT = (0.05, 0.4)

# name -> tokens of each sequence, tokens that came before
BATCHES = {
    "one_token": ([1], [0]),
    "one_token_continued": ([1], [CHUNK]),
    "chunk_less_one": ([CHUNK - 1], [0]),
    "chunk": ([CHUNK], [0]),
    "chunk_and_one": ([CHUNK + 1], [0]),
    "continued_alone_at_a_chunk": ([CHUNK + 3], [CHUNK]),
    "continued_alone_inside_a_chunk": ([CHUNK + 3], [5]),
    "none_continues": ([5, 1, CHUNK, 2 * CHUNK + 3], [0, 0, 0, 0]),
    "some_continue": ([5, 1, CHUNK + 1, 37, 2], [7, 0, CHUNK, 0, 1]),
    "first_alone_continues": ([20, 20], [3, 0]),
    "last_alone_continues": ([20, 20], [0, 3]),
    "all_continue": ([1, 30, 3], [15, 16, 17]),
}
SLOTS = [7, 2, 9, 4, 1]


class Inputs(NamedTuple):
    """What the operator and its reference take, up to the state."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor

    def rows(self, start: int, stop: int) -> "Inputs":
        part = slice(start, stop)
        return self._replace(x=self.x[part], dt=self.dt[part], B=self.B[part], C=self.C[part])

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(t.to(dtype) for t in self))

    def served(self) -> "Inputs":
        """As the mixer passes them: x, B and C side by side in one tensor, dt in a projection's last columns."""
        flat = [t.flatten(1) for t in (self.x, self.B, self.C)]
        packed = inside(torch.cat(flat, 1)).split([t.shape[1] for t in flat], 1)
        x, B, C = (part.unflatten(1, t.shape[1:]) for part, t in zip(packed, (self.x, self.B, self.C), strict=True))
        return self._replace(x=x, B=B, C=C, dt=inside(self.dt))


def inputs(
    tokens: int, dtype: torch.dtype = torch.float32, groups: int = 1, seed: int = 0, sizes: tuple[int, int, int] = SMALL
) -> Inputs:
    """Random inputs; A is exact in bf16, so that a precision's error is that of its arithmetic alone."""
    head_dim, state, _ = sizes
    decay = -torch.linspace(0.3, 9.0, HEADS).bfloat16().float().to(DEVICE)
    return Inputs(
        x=randn(seed + 1, tokens, HEADS, head_dim, dtype=dtype),
        dt=randn(seed + 2, tokens, HEADS, dtype=dtype),
        A=decay,
        B=randn(seed + 3, tokens, groups, state, dtype=dtype, scale=0.5),
        C=randn(seed + 4, tokens, groups, state, dtype=dtype, scale=0.5),
        D=randn(seed + 5, HEADS, dtype=dtype),
        dt_bias=randn(seed + 6, HEADS, dtype=dtype) - 2,
    )


def check(
    batch: str | tuple[list[int], list[int]],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    groups: int = 1,
    limit: tuple[float, float] = NO_LIMIT,
    inner: dict[int, tuple[int, int]] | None = None,
    sizes: tuple[int, int, int] = SMALL,
) -> None:
    lengths, computed = BATCHES[batch] if isinstance(batch, str) else batch
    head_dim, state, chunk_size = sizes
    slots, of_inner = SLOTS[: len(lengths)], [slot for _, slot in (inner or {}).values()]
    plan = prefill_plan(lengths, slots, computed, chunk_size, inner)
    given = inputs(plan.num_tokens, dtype, groups, sizes=sizes)
    cache = Slots(11, (HEADS, head_dim, state), state_dtype)
    history = randn(9, len(lengths), HEADS, head_dim, state, dtype=state_dtype)
    for slot, continues, before in zip(slots, computed, history, strict=True):
        if continues:
            cache.state[slot] = before
    bits = cache.snapshot()
    out = torch.full_like(given.x, float("nan"))

    ssd_prefill(*given.served(), limit, cache.state, plan, out)

    cache.assert_untouched(bits, but=[0, *slots, *of_inner] if inner else slots)
    start, low = 0, product_dtype(dtype)
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        before = history[i] if computed[i] else torch.zeros_like(history[i])
        for tokens, kept in [(length, slot), *([inner[i]] if inner and i in inner else [])]:
            part = given.rows(start, start + tokens)
            exact_y, exact_state = ssd_prefill_reference(*part.to(torch.float64), limit, before.double())
            plain_y, plain_state = ssd_prefill_reference(*part.to(low), limit, before.to(low))
            assert_precise(out[start : start + tokens], exact_y, plain_y, f"y of sequence {i}")
            assert_precise(cache.state[kept], exact_state, plain_state, f"state of sequence {i} after {tokens}")
        start += length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_prefill_is_the_reference(batch: str, dtype: torch.dtype) -> None:
    check(batch, dtype, dtype)


def test_prefill_at_the_9bs_sizes_in_the_launches_of_the_table() -> None:
    """Some launches of the scan have been known to give NaN rows on compute capability 9.0."""
    kernels.use_tuned_launches(*NINE_B, torch.bfloat16, DEVICE)
    check(([300, 40, 257], [100, 0, 256]), torch.bfloat16, torch.bfloat16, sizes=NINE_B)


@pytest.mark.parametrize("batch", ["one_token", "continued_alone_inside_a_chunk", "some_continue"])
def test_bf16_activations_with_an_fp32_state(batch: str) -> None:
    check(batch, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "inner"),
    [
        ("none_continues", {3: (CHUNK + 5, 8)}),
        ("none_continues", {0: (4, 3), 2: (CHUNK - 1, 8), 3: (2 * CHUNK, 6)}),
        ("all_continue", {1: (16, 8)}),
        ("continued_alone_inside_a_chunk", {0: (11, 8)}),  # where a chunk ends anyway
        ("continued_alone_at_a_chunk", {0: (1, 8)}),
    ],
)
def test_states_inside_of_prefills_are_kept(batch: str, inner: dict[int, tuple[int, int]], dtype: torch.dtype) -> None:
    check(batch, dtype, dtype, inner=inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [2, 4])
def test_each_group_of_heads_has_its_own_b_and_c(groups: int, dtype: torch.dtype) -> None:
    check("some_continue", dtype, dtype, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_time_steps_are_clamped_to_the_limit(dtype: torch.dtype) -> None:
    check("some_continue", dtype, dtype, limit=LIMIT)


def test_the_limit_of_the_test_clamps_on_both_sides() -> None:
    """Else the test above could not fail."""
    given = inputs(61)
    dt = torch.nn.functional.softplus(given.dt + given.dt_bias)
    assert (dt < LIMIT[0]).any()
    assert (dt > LIMIT[1]).any()


@pytest.mark.parametrize(
    "pieces",
    [[1, 49], [CHUNK - 1, 2, 33], [CHUNK, 34], [CHUNK + 1, 33], [7, 7, 7, 7, 22], [48, 1, 1], [1, 1, 1, 47]],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_any_split_of_a_prompt_gives_the_same(groups: int, pieces: list[int]) -> None:
    """Pieces of one token at the end run as decode steps, all others as prefills that continue."""
    given = inputs(sum(pieces), groups=groups)
    cache = Slots(4, (HEADS, HEAD_DIM, STATE), torch.float32)
    out, start = torch.full_like(given.x, float("nan")), 0
    for piece in pieces:
        part = given.rows(start, start + piece).served()
        y = out[start : start + piece]
        if piece == 1 and start > CHUNK:
            ssm_step(*part, NO_LIMIT, cache.state, decode_plan([2]), y)
        else:
            ssd_prefill(*part, NO_LIMIT, cache.state, prefill_plan([piece], [2], [start]), y)
        start += piece
    zero = torch.zeros(HEADS, HEAD_DIM, STATE, device=DEVICE)
    exact_y, exact_state = ssd_prefill_reference(*given.to(torch.float64), NO_LIMIT, zero.double())
    low = product_dtype(torch.float32)
    plain_y, plain_state = ssd_prefill_reference(*given.to(low), NO_LIMIT, zero.to(low))
    assert_precise(out, exact_y, plain_y, "y")
    assert_precise(cache.state[2], exact_state, plain_state, "state")


@pytest.mark.xfail(
    DEVICE.type == "cuda", reason="vLLM's Triton softplus is log(1 + exp), which is 0 below -17", strict=True
)
def test_a_time_step_of_softplus_minus_20_is_not_zero() -> None:
    """It is 2e-9: what it writes into the state counts where decay is slow and x is large."""
    given = inputs(CHUNK + 1)
    given = given._replace(
        x=1e6 * given.x, dt=torch.full_like(given.dt, -16.0), dt_bias=torch.full_like(given.dt_bias, -4.0)
    )
    given = given._replace(D=torch.zeros_like(given.D))
    cache = Slots(3, (HEADS, HEAD_DIM, STATE), torch.float32)
    out = torch.empty_like(given.x)
    ssd_prefill(*given.served(), NO_LIMIT, cache.state, prefill_plan([CHUNK + 1], [1]), out)
    assert out.abs().min() > 0
    zero = torch.zeros(HEADS, HEAD_DIM, STATE, device=DEVICE)
    exact_y, exact_state = ssd_prefill_reference(*given.to(torch.float64), NO_LIMIT, zero.double())
    plain_y, plain_state = ssd_prefill_reference(*given, NO_LIMIT, zero)
    assert_precise(out, exact_y, plain_y, "y")
    assert_precise(cache.state[1], exact_state, plain_state, "state")


@pytest.mark.parametrize("wrong", ["x", "dt", "out", "state"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    given, plan = inputs(4), prefill_plan([4], [1])
    state, out = torch.zeros(3, HEADS, HEAD_DIM, STATE, device=DEVICE), torch.zeros_like(given.x)
    if wrong == "x":
        given, out = given.rows(0, 3), out[:3]
    elif wrong == "dt":
        given = given._replace(dt=given.dt[:, 1:])
    elif wrong == "out":
        out = out[:, 1:]
    else:
        state = state[..., 1:]
    with pytest.raises(ValueError, match="do not fit"):
        ssd_prefill(*given, NO_LIMIT, state, plan, out)


@pytest.mark.parametrize("limit", [NO_LIMIT, LIMIT], ids=["no_limit", "limit"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_reference_is_transformers_chunked_scan(
    tokens: int, groups: int, limit: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64: Transformers' function calls `.float()` on its inputs, which is a no-op here."""
    given = inputs(tokens, groups=groups).to(torch.float64)
    state = randn(9, HEADS, HEAD_DIM, STATE, dtype=torch.float64)
    y, last = ssd_prefill_reference(*given, limit, state)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    expected_y, expected_last = modeling_bamba.mamba2_chunk_scan(
        given.x[None],
        given.dt[None],
        given.A,
        given.B[None],
        given.C[None],
        chunk_size=CHUNK,
        D=given.D,
        dt_bias=given.dt_bias,
        initial_states=state[None],
        dt_softplus=True,
        dt_limit=limit,
        return_final_states=True,
    )
    torch.testing.assert_close(y, expected_y[0])
    torch.testing.assert_close(last, expected_last[0])


def test_reference_softplus_of_minus_20_is_exact() -> None:
    """One token from an empty state with D = 0: y = dt x (B . C)."""
    given = inputs(1).to(torch.float64)
    given = given._replace(dt=torch.full_like(given.dt, -20.0), dt_bias=0 * given.dt_bias, D=0 * given.D)
    y, _ = ssd_prefill_reference(*given, NO_LIMIT, torch.zeros(HEADS, HEAD_DIM, STATE, device=DEVICE).double())
    dt = math.log1p(math.exp(-20.0))
    torch.testing.assert_close(y, dt * given.x * (given.B * given.C).sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("batch", BATCHES)
def test_hand_made_chunks_are_those_of_vllms_builder(batch: str) -> None:
    lengths, computed = BATCHES[batch]
    plan = prefill_plan(lengths, SLOTS[: len(lengths)], computed)
    starts, sequences, last, _ = BaseMambaAttentionMetadataBuilder._compute_chunk_metadata(
        CHUNK, len(lengths), torch.tensor(computed), plan.query_start_loc.cpu()
    )
    assert plan.chunk_start_loc.tolist() == starts
    assert plan.chunk_sequence.tolist() == sequences
    assert plan.last_chunk.tolist() == last


def test_chunks_end_at_multiples_of_the_chunk_size() -> None:
    assert chunk_lengths(new=20, computed=5, chunk_size=8) == [3, 8, 8, 1]


def test_prefill_binds_to_vllms_triton_function(monkeypatch: pytest.MonkeyPatch) -> None:
    original = as_on_a_gpu("vllm.model_executor.layers.mamba.ops.ssd_combined", monkeypatch)
    recorder = Recorder(original.mamba_chunk_scan_combined_varlen, lambda call: call["initial_states"])
    inner = Recorder(original._mamba_chunk_scan_combined_fwd, lambda call: None)
    monkeypatch.setattr(original, "_mamba_chunk_scan_combined_fwd", inner)
    monkeypatch.setattr(kernels, "mamba_chunk_scan_combined_varlen", recorder)
    plan, given = prefill_plan([2, 4], [3, 1], [5, 0]), inputs(6, groups=2)
    initial, out = randn(9, 2, HEADS, HEAD_DIM, STATE), torch.empty_like(given.x)
    states, rows, of_inner = kernels.scan(*given, LIMIT, initial, plan, out, torch.float32)
    assert states is initial
    assert rows is plan.last_chunk
    assert of_inner is None
    (call,) = recorder.calls
    passed = {
        **given._asdict(),
        "dt_limit": LIMIT,
        "initial_states": initial,
        "out": out,
        "chunk_size": CHUNK,
        "cu_seqlens": plan.query_start_loc,
        "cu_chunk_seqlens": plan.chunk_start_loc,
        "last_chunk_indices": plan.last_chunk,
        "seq_idx": plan.chunk_sequence,
        "state_dtype": torch.float32,
        "dt_softplus": True,
        "return_intermediate_states": True,
    }
    assert call.keys() == passed.keys()
    assert all(call[name] is value or call[name] == value for name, value in passed.items())
    original.mamba_chunk_scan_combined_varlen(**call)  # and that one passes them all on
    assert inner.calls[0].keys() >= passed.keys()


def test_warm_up_runs_each_size_once_with_and_without_initial_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way that requests take, with a device that is no CPU; what it is made of does not matter."""
    import vllm_bamba.ops.ssd_prefill as op

    calls = []

    def scan(x, dt, A, B, C, D, dt_bias, limit, initial, plan, out, state_dtype):
        calls.append((x, dt, A, B, C, D, dt_bias, initial, plan, out))
        return torch.zeros(1, HEADS, HEAD_DIM, STATE, dtype=state_dtype, device=x.device), plan.last_chunk, None

    monkeypatch.setattr(op, "scan", scan)
    op.warm_up.cache_clear()
    size = ((HEADS, HEAD_DIM), (2, STATE), CHUNK, torch.bfloat16, torch.float32)
    op.warm_up(*size, torch.device("cpu"))
    assert not calls
    for _ in range(2):
        op.warm_up(*size, torch.device("meta"))
    op.warm_up.cache_clear()
    assert [initial is None for *_, initial, _, _ in calls] == [True, False]
    assert calls[1][7].dtype == torch.float32
    for x, dt, A, B, C, D, dt_bias, _, plan, out in calls:
        assert {t.dtype for t in (x, dt, B, C, D, dt_bias, out)} == {torch.bfloat16}
        assert A.dtype == torch.float32
        assert x.shape == out.shape == (CHUNK, HEADS, HEAD_DIM)
        assert B.shape == C.shape == (CHUNK, 2, STATE)
        assert plan.num_tokens == plan.chunk_size == CHUNK


@pytest.mark.parametrize("continues", [False, True])
def test_plan_of_one_chunk_is_the_one_made_by_hand(continues: bool) -> None:
    plan, by_hand = (
        PrefillPlan.of_one_chunk(CHUNK, continues, DEVICE),
        prefill_plan([CHUNK], [0], [CHUNK if continues else 0]),
    )
    for field in dataclasses.fields(plan):
        if field.name != "conv_metadata":
            value, expected = getattr(plan, field.name), getattr(by_hand, field.name)
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


def test_launches_can_be_fixed_where_the_kernel_still_has_such_tiles() -> None:
    @triton.jit
    def kernel(N: tl.constexpr):
        pass

    module = ModuleType("kernels")
    for name in ("fixed", "changed", "left"):
        setattr(module, name, triton.autotune([triton.Config({"N": n}) for n in (1, 2)], key=[])(kernel))
    launch = {"num_warps": 2, "num_stages": 3}
    fix_launches({"fixed": {"N": 4} | launch, "changed": {"M": 4} | launch, "gone": {"N": 4} | launch}, module)
    (config,) = module.fixed.configs
    assert (config.kwargs, config.num_warps, config.num_stages) == ({"N": 4}, 2, 3)
    assert [len(kernel.configs) for kernel in (module.changed, module.left)] == [2, 2]


def test_launches_are_of_these_sizes_or_the_first_of_the_same_gpu(monkeypatch) -> None:
    ours, theirs, others = ({"kernel": {"num_warps": n}} for n in (1, 2, 4))
    table = {((9, 0), (64, 128, 256)): ours, ((9, 0), (32, 64, 256)): theirs, ((8, 0), (16, 16, 256)): others}
    monkeypatch.setattr(tuning, "TUNED", table)
    assert tuning.launches_for((9, 0), (32, 64, 256)) == theirs
    assert tuning.launches_for((9, 0), (16, 16, 256)) == ours
    assert tuning.launches_for((10, 0), (64, 128, 256)) == {}


@pytest.mark.gpu
def test_vllms_scan_kernels_are_found_and_a_start_need_not_try_their_launches_again() -> None:
    tuned = autotuned_kernels(*kernels.MODULES)
    assert len(tuned) >= 4
    assert all(kernel.cache_results for kernel in tuned.values()), "vLLM has Triton keep what it found"
