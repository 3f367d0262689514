"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        replays: whether states are read only and tokens kept in the ring; else every step writes.
        num_warps: of the program that serves a head of a row (`PREPARE` has those of the kernel in front).
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


@dataclass(frozen=True)
class Prepare:
    """How the kernel in front of a replayed step divides its work; the best of twelve ways on an H100.

    Attributes:
        heads: of a group whose factors a program finds.
        folded: channels of a full ring that a program folds; more of them take registers from all programs.
        num_warps: of a program.
    """

    heads: int
    folded: int
    num_warps: int


PREPARE = Prepare(heads=32, folded=32, num_warps=4)
ANY = 1 << 30  # rows

DEFAULT = Tuning(((1, Launch(replays=False, num_warps=8)), (ANY, Launch(replays=True, num_warps=4))))

# (compute capability, bytes of a number in a checkpoint), for activations in bf16 and heads of 64 x 128, as released;
# benchmarks/tune_mixer_step.py, rows of an H100 in benchmarks/results
TUNED: dict[tuple[tuple[int, int], int], Tuning] = {
    ((9, 0), 2): Tuning(
        ((1, Launch(replays=False, num_warps=8)), (ANY, Launch(replays=True, num_warps=4))),
    ),
    ((9, 0), 1): Tuning(
        (
            (1, Launch(replays=False, num_warps=8)),
            (8, Launch(replays=True, num_warps=4)),
            (ANY, Launch(replays=True, num_warps=2)),
        )
    ),
}


def tuning_for(ssm: torch.Tensor, activations: torch.dtype) -> Tuning:
    """What is known to suit a GPU and checkpoints [slots, heads, head_dim, state]."""
    if not ssm.is_cuda or activations != torch.bfloat16 or ssm.shape[2:] != (64, 128):
        return DEFAULT
    return TUNED.get((torch.cuda.get_device_capability(ssm.device), ssm.dtype.itemsize), DEFAULT)


def launches_early(device: torch.device) -> bool:
    """Whether a kernel there can start before the one in front of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
