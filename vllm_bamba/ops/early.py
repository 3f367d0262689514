"""Kernels that start while the one in front of them ends: programmatic dependent launch (NVIDIA, since Hopper).

A kernel launched with `EARLY_LAUNCH` starts once all programs of the one in front of it have said so
(`gdc_launch_dependents`) or ended. It waits (`gdc_wait`) until that one has ended and all that it wrote can be seen.
Ahead of that it reads nothing that the kernel in front writes, writes to vLLM's cache alone, as other memory may have
been the kernel's in front, and does not say that the next may start: then no more than two are at work at once.
"""

import functools
from typing import Any

import torch

EARLY_LAUNCH: dict[str, Any] = {"launch_pdl": True}


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels can be launched so on a device."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
