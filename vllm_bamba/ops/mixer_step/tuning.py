"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        replays: whether states are read only and tokens kept in the ring; else every step writes.
        num_warps: of the program that serves a head of a row.
        max_registers: of a thread, for the compiler; None leaves it the choice, which is as many as it can use.
    """

    replays: bool
    num_warps: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Tuning:
    """Launches by the number of rows, in ascending order: each serves up to so many."""

    launches: tuple[tuple[int, Launch], ...]

    def launch_for(self, rows: int) -> Launch:
        return next((launch for most, launch in self.launches if rows <= most), self.launches[-1][1])


ANY = 1 << 30  # rows

DEFAULT = Tuning(((1, Launch(replays=False, num_warps=8)), (ANY, Launch(replays=True, num_warps=4))))

# (compute capability, bytes of a number in a checkpoint); benchmarks/tune_mixer_step.py, rows of an H100 in
# benchmarks/results
TUNED: dict[tuple[tuple[int, int], int], Tuning] = {
    ((9, 0), 2): Tuning(
        ((1, Launch(replays=False, num_warps=8)), (ANY, Launch(replays=True, num_warps=4))),
    ),
    ((9, 0), 1): Tuning(
        (
            (1, Launch(replays=False, num_warps=8)),
            (8, Launch(replays=True, num_warps=4)),
            (ANY, Launch(replays=True, num_warps=1, max_registers=128)),
        )
    ),
}


def tuning_for(device: torch.device, state_dtype: torch.dtype) -> Tuning:
    """What is known of a GPU and checkpoints of this dtype."""
    if device.type != "cuda":
        return DEFAULT
    return TUNED.get((torch.cuda.get_device_capability(device), state_dtype.itemsize), DEFAULT)
