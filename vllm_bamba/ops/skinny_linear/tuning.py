"""How the kernel is launched. Nothing is tried out at run time: start-up is short and results repeat."""

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


@dataclass(frozen=True)
class Tuning:
    """Launches by the number of rows, in ascending order, for outputs of few columns and of many."""

    few: tuple[Launch, ...]
    many: tuple[Launch, ...]

    def launches(self, columns: int, depth: int) -> list[Launch]:
        """Those that suit a weight [columns, depth]; empty where PyTorch's product is all there is."""
        return [o for o in (self.many if columns > MANY else self.few) if depth % o.depth == 0]


# for bf16, measured on an H200 and on an H100: see benchmarks/NOTES.md
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
)
H100 = Tuning(
    few=(Launch(16, 32, 256, 5, 2), Launch(32, 32, 256, 5, 2)),
    many=(Launch(16, 64, 128, 6, 4), Launch(32, 128, 128, 3, 4), Launch(64, 128, 128, 3, 4)),
)


def tuning_for(capability: tuple[int, int], name: str) -> Tuning | None:
    """What suits a GPU of so many bytes a second, as its name says (H800: an H100's); None where nothing is known.

    A table for another speed of memory loses to a library's product. So it is with the H100's on an H200.
    """
    if capability != (9, 0):
        return None
    if "H200" in name:
        return H200
    return H100 if ("H100" in name or "H800" in name) and "NVL" not in name else None


def launches_for(weight: torch.Tensor) -> list[Launch]:
    """Launches that are faster than a library's product with a weight [N, K], none where nothing is known."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return []
    properties = torch.cuda.get_device_properties(weight.device)
    tuning = tuning_for((properties.major, properties.minor), properties.name)
    return tuning.launches(*weight.shape) if tuning else []
