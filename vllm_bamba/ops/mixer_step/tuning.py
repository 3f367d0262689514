"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        heads_per_program: heads of one row that a program serves; they share one convolution of B and C.
        num_warps: of a program.
        replay_from: rows from which on states are read only and tokens kept in the ring; below, every step writes.
    """

    heads_per_program: int = 4
    num_warps: int = 4
    replay_from: int = 8


DEFAULT = Launch()

# (compute capability) -> launch; an entry comes with the measurement in benchmarks/results that chose it
TUNED: dict[tuple[int, int], Launch] = {}


def launch_for(device: torch.device, heads_per_group: int) -> Launch:
    """The launch for a GPU, with as many heads a program as its groups allow."""
    chosen = DEFAULT
    if device.type == "cuda":
        chosen = TUNED.get(torch.cuda.get_device_capability(device), DEFAULT)
    heads = chosen.heads_per_program
    while heads_per_group % heads:
        heads //= 2
    return Launch(heads, chosen.num_warps, chosen.replay_from)
