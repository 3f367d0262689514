"""The convolution against its reference, the reference against torch's own convolution."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    Recorder,
    Slots,
    as_on_a_gpu,
    assert_precise,
    decode_plan,
    inside,
    prefill_plan,
    randn,
)

from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill, causal_conv1d_step, kernels
from vllm_bamba.ops.causal_conv1d.reference import causal_conv1d_reference
from vllm_bamba.state import PrefillPlan

CHANNELS = 48
LAYOUTS = [pytest.param(False, id="channels_first"), pytest.param(True, id="inputs_first")]

# name -> tokens of each sequence, tokens that came before
BATCHES = {
    "one_token": ([1], [0]),
    "one_token_continued": ([1], [9]),
    "window_less_one": ([3], [0]),
    "window": ([4], [0]),
    "block_less_one": ([7], [0]),  # the Triton kernel works in blocks of 8
    "block": ([8], [0]),
    "block_and_one": ([9], [0]),
    "continued_alone": ([11], [5]),
    "none_continues": ([5, 1, 3, 17], [0, 0, 0, 0]),
    "some_continue": ([5, 1, 2, 17, 2], [3, 0, 8, 0, 0]),
    "all_continue": ([1, 2, 3, 19], [1, 2, 3, 4]),
}
SLOTS = [7, 2, 9, 4, 1]


def parameters(width: int, bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    return randn(1, CHANNELS, width, dtype=dtype, scale=0.5), randn(2, CHANNELS, dtype=dtype) if bias else None


def to(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def check_prefill(
    batch: str,
    dtype: torch.dtype,
    width: int = 4,
    bias: bool = True,
    transposed: bool = True,
    inner: dict[int, tuple[int, int]] | None = None,
) -> None:
    lengths, computed = BATCHES[batch]
    slots, of_inner = SLOTS[: len(lengths)], [slot for _, slot in (inner or {}).values()]
    plan = prefill_plan(lengths, slots, computed, inner=inner)
    weight, b = parameters(width, bias, dtype)
    x = randn(3, plan.num_tokens, CHANNELS, dtype=dtype)
    cache = Slots(11, (CHANNELS, width - 1), dtype, transposed)
    history = randn(4, len(lengths), CHANNELS, width - 1, dtype=dtype)
    for slot, continues, before in zip(slots, computed, history, strict=True):
        if continues:
            cache.state[slot] = before
    bits = cache.snapshot()

    y = causal_conv1d_prefill(inside(x), weight, b, cache.state, plan)

    assert y.dtype == dtype
    assert y.shape == x.shape
    cache.assert_untouched(bits, but=[0, *slots, *of_inner] if inner else slots)
    start = 0
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        before = history[i] if computed[i] else torch.zeros_like(history[i])
        if inner and i in inner:
            offset, kept = inner[i]
            assert torch.equal(cache.state[kept], x[start + offset - (width - 1) : start + offset].t())
        args = (x[start : start + length], weight, b, before)
        exact_y, exact_state = causal_conv1d_reference(*to(torch.float64, *args))
        plain_y, _ = causal_conv1d_reference(*args)
        assert_precise(y[start : start + length], exact_y, plain_y, f"y of sequence {i}")
        assert torch.equal(cache.state[slot].double(), exact_state), f"inputs kept of sequence {i}"
        start += length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_prefill_is_the_reference(batch: str, dtype: torch.dtype) -> None:
    check_prefill(batch, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_prefill_of_every_width_with_and_without_bias(width: int, bias: bool) -> None:
    check_prefill("some_continue", torch.float32, width, bias)
    check_prefill("all_continue", torch.float32, width, bias)


@pytest.mark.parametrize("transposed", LAYOUTS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_inputs_of_states_inside_of_prefills_are_kept(width: int, transposed: bool) -> None:
    check_prefill("some_continue", torch.float32, width, transposed=transposed, inner={0: (3, 8), 3: (16, 5)})
    check_prefill("block_and_one", torch.bfloat16, width, transposed=transposed, inner={0: (8, 5)})


@pytest.mark.parametrize("transposed", LAYOUTS)
def test_prefill_reads_and_writes_either_layout_of_the_state(transposed: bool) -> None:
    check_prefill("some_continue", torch.float32, transposed=transposed)


def check_step(
    slots: list[int], dtype: torch.dtype, width: int = 4, bias: bool = True, transposed: bool = True
) -> None:
    plan = decode_plan(slots)
    weight, b = parameters(width, bias, dtype)
    x = randn(5, len(slots), CHANNELS, dtype=dtype)
    cache = Slots(11, (CHANNELS, width - 1), dtype, transposed)
    history = randn(6, len(slots), CHANNELS, width - 1, dtype=dtype)
    for slot, before in zip(slots, history, strict=True):
        if slot:
            cache.state[slot] = before
    bits = cache.snapshot()

    y = causal_conv1d_step(inside(x), weight, b, cache.state, plan)

    assert y.dtype == dtype
    cache.assert_untouched(bits, but=[slot for slot in slots if slot])
    for i, slot in enumerate(slots):
        if slot:
            args = (x[i : i + 1], weight, b, history[i])
            exact_y, exact_state = causal_conv1d_reference(*to(torch.float64, *args))
            plain_y, _ = causal_conv1d_reference(*args)
            assert_precise(y[i : i + 1], exact_y, plain_y, f"y of row {i}")
            assert torch.equal(cache.state[slot].double(), exact_state), f"inputs kept of row {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [[3], [7, 2, 9, 4], [5, 0, 8, 0]], ids=["alone", "scattered_slots", "padded_rows"])
def test_step_is_the_reference(slots: list[int], dtype: torch.dtype) -> None:
    check_step(slots, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_step_of_every_width_with_and_without_bias(width: int, bias: bool) -> None:
    check_step([7, 2, 0, 4], torch.float32, width, bias)


@pytest.mark.parametrize("transposed", LAYOUTS)
def test_step_reads_and_writes_either_layout_of_the_state(transposed: bool) -> None:
    check_step([7, 2, 0, 4], torch.float32, transposed=transposed)


@pytest.mark.parametrize("pieces", [[1, 20], [2, 1, 18], [3, 3, 15], [8, 12, 1], [1, 1, 1, 1, 17], [19, 1, 1]], ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_any_split_of_a_prompt_gives_the_same(width: int, pieces: list[int]) -> None:
    """Pieces of one token at the end run as decode steps, all others as prefills that continue."""
    weight, bias = parameters(width, True, torch.float32)
    x = randn(7, sum(pieces), CHANNELS)
    cache = Slots(4, (CHANNELS, width - 1), torch.float32, transposed=True)
    outputs, start = [], 0
    for piece in pieces:
        part = inside(x[start : start + piece])
        if start > width and piece == 1:
            outputs.append(causal_conv1d_step(part, weight, bias, cache.state, decode_plan([2])))
        else:
            plan = prefill_plan([piece], [2], [start])
            outputs.append(causal_conv1d_prefill(part, weight, bias, cache.state, plan))
        start += piece
    args = (x, weight, bias, torch.zeros(CHANNELS, width - 1, device=DEVICE))
    exact_y, exact_state = causal_conv1d_reference(*to(torch.float64, *args))
    plain_y, _ = causal_conv1d_reference(*args)
    assert_precise(torch.cat(outputs), exact_y, plain_y, "y")
    assert torch.equal(cache.state[2].double(), exact_state)


@pytest.mark.parametrize(
    ("x", "state"),
    [
        ((5, CHANNELS), (3, CHANNELS, 3)),
        ((4, 8), (3, CHANNELS, 3)),
        ((4, CHANNELS), (3, 8, 3)),
        ((4, CHANNELS), (3, CHANNELS, 2)),
    ],
    ids=["too_many_tokens", "channels_of_x", "channels_of_the_state", "state_too_short"],
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int, ...], state: tuple[int, ...]) -> None:
    weight, bias = parameters(4, True, torch.float32)
    arguments = (torch.zeros(x, device=DEVICE), weight, bias, torch.zeros(state, device=DEVICE))
    with pytest.raises(ValueError, match="do not fit"):
        causal_conv1d_prefill(*arguments, prefill_plan([4], [1]))
    with pytest.raises(ValueError, match="do not fit"):
        causal_conv1d_step(*arguments, decode_plan([1, 2, 1, 2]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_reference_is_torchs_convolution(tokens: int, width: int, bias: bool) -> None:
    weight, b = to(torch.float64, *parameters(width, bias, torch.float32))
    x = randn(8, tokens, CHANNELS, dtype=torch.float64)
    before = randn(9, CHANNELS, width - 1, dtype=torch.float64)
    inputs = torch.cat([before, x.T], 1)
    y, last = causal_conv1d_reference(x, weight, b, before)
    torch.testing.assert_close(y, F.silu(F.conv1d(inputs[None], weight[:, None], b, groups=CHANNELS))[0].T)
    assert torch.equal(last, inputs[:, -(width - 1) :])


TRITON = "vllm.model_executor.layers.mamba.ops.causal_conv1d"


def test_prefill_binds_to_vllms_triton_function(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(as_on_a_gpu(TRITON, monkeypatch).causal_conv1d_fn, lambda call: call["x"])
    monkeypatch.setattr(kernels, "causal_conv1d_fn", recorder)
    weight, bias = parameters(4, True, torch.float32)
    x, cache, plan = (
        randn(3, 6, CHANNELS),
        Slots(4, (CHANNELS, 3), torch.float32, True),
        prefill_plan([2, 4], [3, 1], [5, 0]),
    )
    y = kernels.prefill(inside(x), weight, bias, cache.state, plan)
    (call,) = recorder.calls
    assert y.shape == x.shape
    assert call["x"].shape == (CHANNELS, 6)
    assert call["x"].stride(0) == 1, "the kernel wants the channels next to each other"
    assert call["weight"] is weight
    assert call["bias"] is bias
    assert call["conv_states"] is cache.state
    assert call["cache_indices"] is plan.slots
    assert call["has_initial_state"] is plan.continues
    assert call["query_start_loc"] is plan.query_start_loc
    assert call["activation"] == "silu"


def test_step_binds_to_vllms_triton_function(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(as_on_a_gpu(TRITON, monkeypatch).causal_conv1d_update, lambda call: call["x"])
    monkeypatch.setattr(kernels, "causal_conv1d_update", recorder)
    weight, bias = parameters(4, True, torch.float32)
    x, cache, plan = randn(3, 2, CHANNELS), Slots(4, (CHANNELS, 3), torch.float32, True), decode_plan([3, 1])
    kernels.step(x, weight, bias, cache.state, plan)
    (call,) = recorder.calls
    assert call["x"] is x
    assert call["conv_state"] is cache.state
    assert call["weight"] is weight
    assert call["bias"] is bias
    assert call["conv_state_indices"] is plan.slots
    assert call["max_query_len"] == 1
    assert call["num_accepted_tokens"] is None
    assert call["query_start_loc"] is None
    assert call["activation"] == "silu"


def test_metadata_that_vllm_builds_is_what_the_triton_function_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`conv_metadata` is vLLM's own batch metadata: the attributes that the function takes from it are there."""
    import dataclasses
    import inspect
    import re

    from vllm_bamba.compat import Mamba2AttentionMetadata

    source = inspect.getsource(as_on_a_gpu(TRITON, monkeypatch).causal_conv1d_fn)
    read = set(re.findall(r"\bmetadata\.(\w+)", source))
    assert read
    assert read <= {field.name for field in dataclasses.fields(Mamba2AttentionMetadata)}
    assert "conv_metadata" in {field.name for field in dataclasses.fields(PrefillPlan)}


def test_a_long_prompts_places_in_memory_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens times what lies between them pass 2^31 at 128,000 tokens of the 9B: vLLM's kernel counts in 64 bits."""
    import inspect
    import re

    source = inspect.getsource(as_on_a_gpu(TRITON, monkeypatch))
    kernel = source[source.index("def _causal_conv1d_fwd_kernel") :].partition("):")[0]
    assert dict(re.findall(r"(stride_[xo]_token): (\S+?),", kernel)) == dict.fromkeys(
        ("stride_x_token", "stride_o_token"), "tl.int64"
    )
