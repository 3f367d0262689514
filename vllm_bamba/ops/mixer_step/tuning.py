"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat."""

from dataclasses import dataclass

import torch

from vllm_bamba.state import FusedSlots


@dataclass(frozen=True)
class Launch:
    """Choices that change speed and, through the order of sums, last bits.

    Attributes:
        num_warps: of the program that serves a head of a row (`PREPARE` has those of the kernel in front).
        max_registers: of a thread, for the compiler; None leaves it the choice, which is as many as it can use.
    """

    num_warps: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Prepare:
    """How the kernel in front of a replayed step divides its work.

    Attributes:
        heads: of a group whose factors a program finds.
        folded: channels of a full ring that a program folds; more of them take registers from all programs.
        num_warps: of a program.
    """

    heads: int
    folded: int
    num_warps: int


PREPARE = Prepare(heads=64, folded=32, num_warps=8)
DEFAULT = Launch(num_warps=4)

# (compute capability, bytes of a number in a checkpoint), for slots with rings, activations in bf16 and heads of
# 64 x 128, as released, any number of rows; benchmarks/tune_mixer_step.py, rows of an H100 in benchmarks/results
TUNED: dict[tuple[tuple[int, int], int], Launch] = {
    ((9, 0), 2): Launch(num_warps=4),
    ((9, 0), 1): Launch(num_warps=1),
}


def launch_for(slots: FusedSlots, activations: torch.dtype) -> Launch:
    """What is known to suit a GPU and these slots."""
    ssm = slots.ssm
    if not ssm.is_cuda or slots.ring_dt is None or activations != torch.bfloat16 or ssm.shape[2:] != (64, 128):
        return DEFAULT
    return TUNED.get((torch.cuda.get_device_capability(ssm.device), ssm.dtype.itemsize), DEFAULT)
