"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        heads: heads of one row that a program serves; they share one convolution of B and C.
        num_warps: of a program. Fewer leave less to do twice, more wait less for one another's loads.
        replays: whether states are read only and tokens kept in the ring; else every step writes.
        max_registers: of a thread, for the compiler; None leaves it the choice, which is as many as it can use.
    """

    heads: int
    num_warps: int
    replays: bool
    max_registers: int | None = None


@dataclass(frozen=True)
class Tuning:
    """Launches by the number of rows, in ascending order: each serves up to so many."""

    launches: tuple[tuple[int, Launch], ...]

    def launch_for(self, rows: int, heads_per_group: int) -> Launch:
        """The launch for a batch, with as many heads a program as its groups allow."""
        launch = next((launch for most, launch in self.launches if rows <= most), self.launches[-1][1])
        heads = launch.heads
        while heads_per_group % heads:
            heads //= 2
        return replace(launch, heads=heads)


ANY = 1 << 30  # rows

DEFAULT = Tuning(((1, Launch(heads=1, num_warps=8, replays=False)), (ANY, Launch(heads=1, num_warps=4, replays=True))))

# (compute capability, bytes of a number in a checkpoint); benchmarks/tune_mixer_step.py, rows of an H100 in
# benchmarks/results
TUNED: dict[tuple[tuple[int, int], int], Tuning] = {
    ((9, 0), 2): Tuning(
        (
            (1, Launch(heads=1, num_warps=8, replays=False)),
            (ANY, Launch(heads=1, num_warps=2, replays=True, max_registers=128)),
        )
    ),
    ((9, 0), 1): Tuning(
        (
            (1, Launch(heads=1, num_warps=8, replays=False)),
            (4, Launch(heads=1, num_warps=2, replays=True)),
            (8, Launch(heads=2, num_warps=2, replays=True)),
            (16, Launch(heads=4, num_warps=4, replays=True, max_registers=128)),
            (ANY, Launch(heads=8, num_warps=4, replays=True, max_registers=128)),
        )
    ),
}


def tuning_for(device: torch.device, state_dtype: torch.dtype) -> Tuning:
    """What is known of a GPU and checkpoints of this dtype."""
    if device.type != "cuda":
        return DEFAULT
    return TUNED.get((torch.cuda.get_device_capability(device), state_dtype.itemsize), DEFAULT)
