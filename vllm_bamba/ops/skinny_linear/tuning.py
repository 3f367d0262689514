"""How the kernel is launched. Nothing is tried out at run time: start-up is short and results repeat."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MANY = 8192  # columns: enough for wide programs to keep all of a GPU busy


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        rows: the most that are served.
        columns: of the output, a program.
        depth: of the sums, a step.
        num_stages: steps whose weights are on their way at once.
        num_warps: of a program.
        described: whether the GPU's copy engine (TMA) fetches what is multiplied, told by tensor descriptors.
    """

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    described: bool = False


def fitting(launches: Sequence[Launch], depth: int) -> list[Launch]:
    """Launches whose steps divide a sum of `depth` numbers."""
    return [launch for launch in launches if depth % launch.depth == 0]


@dataclass(frozen=True)
class Tuning:
    """Launches by the number of rows, in ascending order.

    Attributes:
        few: for outputs of few columns.
        many: for outputs of many.
        gated: for gated ones.
        gated_whole: for gated ones of more rows than the others serve, which nothing is left to be divided of.
    """

    few: tuple[Launch, ...]
    many: tuple[Launch, ...]
    gated: tuple[Launch, ...]
    gated_whole: tuple[Launch, ...] = ()

    @property
    def rows(self) -> int:
        """The most that all kinds of outputs have a launch for."""
        return min(kind[-1].rows for kind in (self.few, self.many, self.gated))

    def launches(self, columns: int, depth: int) -> list[Launch]:
        """Those that suit a weight [columns, depth]; empty where PyTorch's product is all there is."""
        return fitting(self.many if columns > MANY else self.few, depth)


# for bf16, measured on an H200 and on an H100, gated ones on an H100: see benchmarks/NOTES.md
GATED = (
    Launch(8, 64, 256, 3, 4, described=True),
    Launch(16, 64, 256, 3, 4, described=True),
    Launch(32, 64, 128, 5, 4, described=True),
    Launch(64, 64, 128, 4, 4, described=True),
)
H200 = Tuning(
    few=(
        Launch(8, 32, 256, 5, 2, described=True),
        Launch(16, 64, 256, 5, 4, described=True),
        Launch(32, 64, 128, 9, 4, described=True),
        Launch(64, 64, 128, 6, 4, described=True),
    ),
    many=(
        Launch(8, 128, 256, 3, 4, described=True),
        Launch(16, 128, 256, 3, 4, described=True),
        Launch(32, 64, 128, 4, 4, described=True),
        Launch(64, 128, 128, 4, 4, described=True),
    ),
    gated=GATED,
    gated_whole=(Launch(128, 128, 64, 4, 8, described=True),),
)
H100 = Tuning(
    few=(
        Launch(8, 32, 256, 5, 2, described=True),
        Launch(16, 32, 256, 4, 2),
        Launch(32, 64, 256, 4, 4, described=True),
        Launch(64, 64, 128, 6, 4, described=True),
    ),
    many=(
        Launch(8, 64, 256, 3, 4, described=True),
        Launch(16, 64, 128, 5, 4),
        Launch(32, 64, 128, 4, 4, described=True),
        Launch(64, 128, 128, 4, 4, described=True),
    ),
    gated=GATED,
)


def tuning_for(capability: tuple[int, int], name: str) -> Tuning | None:
    """What suits a GPU of so many bytes a second, as its name says (H800: an H100's); None where nothing is known.

    A table for another speed of memory loses to a library's product. So it is with the H100's on an H200.
    """
    if capability != (9, 0) or "GH200" in name or "PCIe" in name:
        return None
    if "H200" in name:
        return H200
    return H100 if ("H100" in name or "H800" in name) and "NVL" not in name else None


@functools.cache
def tuning_of(device: torch.device) -> Tuning | None:
    """What suits a device; None where nothing is known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return tuning_for((properties.major, properties.minor), properties.name)


def launches_for(weight: torch.Tensor) -> list[Launch]:
    """Launches that are faster than a library's product with a weight [N, K], none where nothing is known."""
    tuning = tuning_of(weight.device) if weight.dtype == torch.bfloat16 else None
    return tuning.launches(*weight.shape) if tuning else []


def first_for(launches: Sequence[Launch], rows: int, depth: int) -> Launch | None:
    """The first of some in ascending order that serves so many rows and sums of such a depth."""
    return next((launch for launch in fitting(launches, depth) if rows <= launch.rows), None)
