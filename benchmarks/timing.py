"""Time functions so that the numbers can be believed: cold cache, interleaved, the median and its spread."""

import pathlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SLEEP_CYCLES = 2_000_000  # about 1 ms: the GPU waits while Python queues what is timed


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in the unit in which they were taken."""

    values: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """10th percentile; the smallest of fewer than ten."""
        return self._percentile(10)

    @property
    def high(self) -> float:
        """90th percentile; the largest of fewer than ten."""
        return self._percentile(90)

    def _percentile(self, p: int) -> float:
        ordered = sorted(self.values)
        if len(ordered) < 10:
            return ordered[0] if p < 50 else ordered[-1]
        return statistics.quantiles(ordered, n=100, method="inclusive")[p - 1]

    def map(self, function: Callable[[float], float]) -> "Samples":
        return Samples(tuple(function(v) for v in self.values))


def last_level_cache() -> int:
    """Bytes of the cache that must be emptied: a GPU's L2, a CPU's L3 (32 MiB where it does not say)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    file = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = file.read_text().strip() if file.is_file() else "32768K"
    return int(text.removesuffix("K")) * 1024


def interleaved(
    variants: Mapping[str, Callable[[], object]], repeats: int, seed: int, warm_up: int = 3
) -> dict[str, Samples]:
    """Milliseconds of each variant: each round runs all of them once, in a new random order, each on a cold cache.

    On a GPU the time is between two events around the call; a short sleep is queued before the first, so that
    Python's launch overhead is not in it. On a CPU it is the wall clock.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: expected at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flush = torch.zeros(2 * last_level_cache() // 4, dtype=torch.int32, device=device)
    once = _once_on_gpu if device == "cuda" else _once_on_cpu
    for _ in range(warm_up):
        for call in variants.values():
            call()
    order, times = random.Random(seed), {name: list[float]() for name in variants}
    for _ in range(repeats):
        for name in order.sample(list(variants), len(variants)):
            flush.sum()  # read, not written: what is written would be on its way to memory while the call is timed
            times[name].append(once(variants[name]))
    return {name: Samples(tuple(values)) for name, values in times.items()}


def _once_on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _once_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def wall_clock(call: Callable[[], object], repeats: int, warm_up: int = 1) -> Samples:
    """Seconds of a call that ends with its results in hand."""
    for _ in range(warm_up):
        call()
    values = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        values.append(time.perf_counter() - start)
    return Samples(tuple(values))


@dataclass(frozen=True)
class Limits:
    """What this device was measured to reach, today: bytes moved and matrix-multiply operations a second."""

    bytes_per_second: float
    flops: float

    def floor_ms(self, bytes_moved: float, operations: float = 0.0) -> float:
        """The least time that a kernel needs which moves and computes so much, each at full speed."""
        return max(bytes_moved / self.bytes_per_second, operations / self.flops) * 1e3


def measure_limits(dtype: torch.dtype, repeats: int = 20, seed: int = 0) -> Limits:
    """Time a large copy (read and write) and a large square matrix product in `dtype`."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    source = torch.ones((2 << 30) if gpu else 4 * last_level_cache(), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 512
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    times = interleaved(calls, repeats, seed)
    return Limits(
        bytes_per_second=2 * source.numel() / (times["copy"].median / 1e3),
        flops=2 * size**3 / (times["matmul"].median / 1e3),
    )
