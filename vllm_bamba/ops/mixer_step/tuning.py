"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        heads: heads of one row that a program serves; they share one convolution of B and C.
        written: channels of a head whose ring is folded at a time, at least 16; fewer take fewer registers, of which
            the kernel needs as many as its greediest part.
        num_warps: of a program.
        replays: whether states are read only and tokens kept in the ring; else every step writes.
        max_registers: of a thread, for the compiler; None leaves it the choice.
    """

    heads: int
    written: int
    num_warps: int
    replays: bool
    max_registers: int | None = None
    split: bool = False


@dataclass(frozen=True)
class Tuning:
    """Launches by the number of rows, in ascending order: each serves up to so many."""

    launches: tuple[tuple[int, Launch], ...]

    def launch_for(self, rows: int, heads_per_group: int, head_dim: int) -> Launch:
        """The launch for a batch, with as many heads and channels as the model has."""
        launch = next((launch for most, launch in self.launches if rows <= most), self.launches[-1][1])
        heads = launch.heads
        while heads_per_group % heads:
            heads //= 2
        return replace(launch, heads=heads, written=min(launch.written, head_dim))


DEFAULT = Tuning(
    (
        (8, Launch(heads=1, written=16, num_warps=4, replays=False)),
        (1 << 30, Launch(heads=1, written=16, num_warps=4, replays=True, split=True)),
    )
)

# (compute capability, 8-bit states) -> tuning; an entry comes with the measurement in benchmarks/results that chose it
TUNED: dict[tuple[tuple[int, int], bool], Tuning] = {}


def tuning_for(device: torch.device, quantised: bool) -> Tuning:
    """What is known of a GPU."""
    if device.type != "cuda":
        return DEFAULT
    return TUNED.get((torch.cuda.get_device_capability(device), quantised), DEFAULT)
