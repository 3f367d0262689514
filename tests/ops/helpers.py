"""Batches for the operators' tests: plans made by hand, poisoned state slots, and the tolerance.

The same tests serve a GPU and a machine without: everything is made on the device of vLLM's platform, and the
operators choose their kernels by that platform.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from vllm_bamba.state import INPUTS, DecodePlan, InnerStates, PrefillPlan

DEVICE = torch.device(current_platform.device_type)
DTYPES = [torch.float32, torch.bfloat16]
CHUNK = 16
NO_LIMIT = (0.0, float("inf"))


def randn(seed: int, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(size, generator=generator)).to(DEVICE, dtype)


def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def chunk_lengths(new: int, computed: int, chunk_size: int, inner: int = 0) -> list[int]:
    """Tokens of each chunk of a sequence: chunks end at multiples of `chunk_size` of its position, and at `inner`."""
    cuts = [0, *(n for n in range(1, new) if (computed + n) % chunk_size == 0 or n == inner), new]
    return [end - start for start, end in itertools.pairwise(cuts)]


def prefill_plan(
    lengths: list[int],
    slots: list[int],
    computed: list[int] | None = None,
    chunk_size: int = CHUNK,
    inner: dict[int, tuple[int, int]] | None = None,
) -> PrefillPlan:
    """Sequences of `lengths` new tokens, of which `computed` came before.

    Of a sequence in `inner` the state after some of its new tokens is kept in another slot.
    """
    computed = computed or [0] * len(lengths)
    offsets = [0, *itertools.accumulate(lengths)]
    inside = [(inner or {}).get(i, (0, 0)) for i in range(len(lengths))]
    chunks = [
        chunk_lengths(n, c, chunk_size, offset) for n, c, (offset, _) in zip(lengths, computed, inside, strict=True)
    ]
    last = [n - 1 for n in itertools.accumulate(map(len, chunks))]
    conv_metadata = None
    if DEVICE.type == "cuda":
        names = ("nums_dict", "batch_ptr", "token_chunk_offset_ptr")
        values = compute_causal_conv1d_metadata(torch.tensor(offsets, dtype=torch.int32), device=DEVICE)
        conv_metadata = SimpleNamespace(**dict(zip(names, values, strict=True)))
    return PrefillPlan(
        num_tokens=offsets[-1],
        slots=ints(slots),
        lengths=ints([n + c for n, c in zip(lengths, computed, strict=True)]),
        query_start_loc=ints(offsets),
        continues=torch.tensor([c > 0 for c in computed], device=DEVICE),
        any_continues=any(computed),
        chunk_size=chunk_size,
        chunk_start_loc=ints([0, *itertools.accumulate(itertools.chain(*chunks))]),
        chunk_sequence=ints([i for i, of_sequence in enumerate(chunks) for _ in of_sequence]),
        last_chunk=ints(last),
        conv_metadata=conv_metadata,
        inner=None if inner is None else inner_states(inside, offsets, computed, chunks, last),
    )


def inner_states(
    inside: list[tuple[int, int]], offsets: list[int], computed: list[int], chunks: list[list[int]], last: list[int]
) -> InnerStates:
    """Of each sequence's (offset, slot); 0 where nothing is kept."""
    ends = [
        end - len(of_one) + 1 + [*itertools.accumulate(of_one)].index(offset) if offset else 0
        for end, of_one, (offset, _) in zip(last, chunks, inside, strict=True)
    ]
    places = [start + offset for start, (offset, _) in zip(offsets[:-1], inside, strict=True)]
    return InnerStates(
        slots=ints([slot for _, slot in inside]),
        lengths=ints([c + offset for c, (offset, _) in zip(computed, inside, strict=True)]),
        inputs=ints([[max(0, place - i) for i in range(INPUTS, 0, -1)] for place in places]).long(),
        chunks=ints(ends),
        offsets=tuple(offset for offset, _ in inside),
    )


def decode_plan(slots: list[int], lengths: list[int] | None = None, tokens: list[int] | None = None) -> DecodePlan:
    """One token for each slot, or `tokens`, the last of `lengths`; slot 0 is a padded row."""
    lengths = lengths or [1] * len(slots)
    starts = None if tokens is None else ints([0, *itertools.accumulate(tokens)])
    return DecodePlan(sum(tokens or [1] * len(slots)), ints(slots)[:, None], ints(lengths), starts, accepted=None)


class Slots:
    """State slots inside larger pages, as vLLM lays them out; all poisoned with NaN until set.

    Attributes:
        state: [slots, *shape], a strided view like the one that vLLM binds.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False):
        stored = shape[::-1] if transposed else shape
        size = torch.Size(stored).numel()
        self.pages = torch.full((count, size + 24), float("nan"), dtype=dtype, device=DEVICE)
        view = self.pages[:, 8 : 8 + size].view(count, *stored)
        self.state = view.transpose(-1, -2) if transposed else view

    def snapshot(self) -> torch.Tensor:
        """The bits of all pages, the bytes around the states among them."""
        return self.pages.view(torch.int16 if self.pages.itemsize == 2 else torch.int32).clone()

    def assert_untouched(self, before: torch.Tensor, but: list[int]) -> None:
        """Every bit outside the states of the slots `but` is as it was `before`."""
        now = Slots.__new__(Slots)
        now.pages = self.pages.clone()
        shape, strides, offset = self.state.shape, self.state.stride(), self.state.storage_offset()
        old = before.view(self.pages.dtype).as_strided(shape, strides, offset)
        now.pages.as_strided(shape, strides, offset)[but] = old[but]
        changed = (now.snapshot() != before).any(1).nonzero().flatten().tolist()
        assert not changed, f"slots {changed} changed, of which only {but} were handed out"


def inside(packed: torch.Tensor, before: int = 3, after: int = 5) -> torch.Tensor:
    """A copy of `packed` [tokens, channels] whose rows are parts of longer rows, as after a fused projection."""
    rows = torch.full((len(packed), before + packed.shape[1] + after), float("nan"), dtype=packed.dtype, device=DEVICE)
    rows[:, before : before + packed.shape[1]] = packed
    return rows[:, before : before + packed.shape[1]]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of matrix products in a prefill: Triton takes fp32 in tf32, with the mantissa of fp16."""
    return torch.float16 if DEVICE.type == "cuda" and dtype == torch.float32 else dtype


def worst(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error; NaN stays NaN and fails every comparison."""
    return (value.double() - exact).abs().max().item()


def usual(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error."""
    return (value.double() - exact).square().mean().sqrt().item()


def assert_precise(
    value: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    what: str,
    far: Callable[[torch.Tensor, torch.Tensor], float] = worst,
) -> None:
    """`value` is at most twice as `far` from the fp64 truth as plain torch code in the same precision.

    The floor, for the cases that plain code gets exactly right by chance, is one unit in the last place of the
    largest number; on a GPU two in fp32, which is what `ex2.approx`, Triton's exp, may be off by (PTX ISA).
    """
    assert exact.dtype == torch.float64
    assert value.shape == exact.shape, f"{what}: {tuple(value.shape)}, not {tuple(exact.shape)}"
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(plain.dtype).eps)
    units = 2 if DEVICE.type == "cuda" and eps == torch.finfo(torch.float32).eps else 1
    floor = units * eps * exact.abs().max().item()
    error, allowed = far(value, exact), 2 * far(plain.to(value.dtype), exact) + floor
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def as_on_a_gpu(module: str, monkeypatch) -> ModuleType:
    """A second copy of one of vLLM's modules, whose names are what they are on a GPU.

    On the CPU platform vLLM's operator modules end by putting CPU functions in the place of the Triton ones. The copy
    is executed with the platform saying that it is no CPU, so it keeps the original signatures.
    """
    origin = importlib.util.find_spec(module)
    parent, _, name = module.rpartition(".")
    spec = importlib.util.spec_from_file_location(f"{parent}.original_{name}", origin.origin)
    copy = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(type(current_platform), "is_cpu", lambda self: False)
        spec.loader.exec_module(copy)
    return copy


class Recorder:
    """Stands for a function of vLLM: binds each call to the function's signature and remembers the arguments."""

    def __init__(self, function: Callable[..., object], answer: Callable[[dict[str, object]], object]):
        self.signature = inspect.signature(function)
        self.answer = answer
        self.calls: list[dict[str, object]] = []

    def __call__(self, *args: object, **kwargs: object) -> object:
        bound = self.signature.bind(*args, **kwargs)  # TypeError: a name that vLLM does not know, or one it misses
        self.calls.append(dict(bound.arguments))
        return self.answer(self.calls[-1])
