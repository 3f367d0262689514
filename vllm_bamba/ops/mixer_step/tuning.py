"""How the kernels are launched. Nothing is tried out at run time: start-up is short and results repeat.

`num_warps` of the programs that serve a head of a row changes speed and, through the order of sums, last bits.
"""

from dataclasses import dataclass

import torch

from vllm_bamba.state import FusedSlots


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


PREPARE = Prepare(heads=64, folded=32, num_warps=8)  # of anchored slots, which fold elsewhere
PREPARE_AND_FOLD = Prepare(heads=32, folded=32, num_warps=2)
DEFAULT_WARPS = 4


@dataclass(frozen=True)
class PrepareDrafts:
    """The same with drafted tokens, where what is no fold is one program for a whole group."""

    folded: int
    num_warps: int


PREPARE_DRAFTS = PrepareDrafts(folded=32, num_warps=4)  # two need up to twice the registers, eight more instructions
DRAFT_WARPS = 4  # two need three times the registers and one spills

# (compute capability, bytes of a number in a checkpoint), for slots with rings, activations in bf16 and heads of
# 64 x 128, as released; benchmarks/tune_mixer_step.py
WARPS: dict[tuple[tuple[int, int], int], int] = {((9, 0), 2): 4, ((9, 0), 1): 1}


def warps_for(slots: FusedSlots, activations: torch.dtype) -> int:
    """What is known to suit a GPU and these slots."""
    ssm = slots.ssm
    if slots.drafts:
        return DRAFT_WARPS
    if not ssm.is_cuda or slots.ring_dt is None or activations != torch.bfloat16 or ssm.shape[2:] != (64, 128):
        return DEFAULT_WARPS
    return WARPS.get((torch.cuda.get_device_capability(ssm.device), ssm.dtype.itemsize), DEFAULT_WARPS)


def prepare_for(slots: FusedSlots) -> Prepare:
    """How the kernel in front works on these slots, which take no tokens back."""
    return PREPARE_AND_FOLD if slots.anchor is None else PREPARE


def starts_early(device: torch.device) -> bool:
    """Whether kernels can start while the one in front is at work: programmatic dependent launch, from 9.0 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def multiplies_integers(slots: FusedSlots, activations: torch.dtype) -> bool:
    """Whether int8 checkpoints are multiplied as integers: on GPUs where it was tested, and in Triton's interpreter.

    Triton 3.9 refuses to on 10.0, and everywhere with fewer than 32 numbers.
    """
    ssm = slots.ssm
    shown = not ssm.is_cuda or torch.cuda.get_device_capability(ssm.device) == (9, 0)
    return shown and ssm.dtype == torch.int8 and activations == torch.bfloat16 and ssm.shape[3] >= 32
