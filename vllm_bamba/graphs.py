"""Which CUDA graphs vLLM makes of the model when it starts, and how, so that it starts sooner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_bamba.compat import cut_graphs_without_compiling
from vllm_bamba.step_options import is_all_kernels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

    from vllm_bamba.config import BambaShape


def choose_graphs(vllm_config: VllmConfig, shape: BambaShape) -> None:
    """Have vLLM make fewer graphs, and without torch.compile where that has nothing to fuse; what the user chose stays.

    Graphs of drafted tokens are of multiples of their number, which vLLM knows better.
    """
    if not current_platform.is_cuda_alike():
        return
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    other_backend = compilation.backend != current_platform.get_compile_backend()
    compiles = compilation.mode is not None or other_backend or bool(compilation.compile_sizes)
    left_to_us = not vllm_config.model_config.enforce_eager and not compiles
    cut_graphs_without_compiling(left_to_us and is_all_kernels(vllm_config, shape))
    chosen = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    if chosen or vllm_config.num_speculative_tokens or vllm_config.performance_mode != "balanced":
        return
    sequences, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    most = 1024 if current_platform.is_device_capability_family(100) else 512  # as in `VllmConfig._set_cudagraph_sizes`
    compilation.cudagraph_capture_sizes = graph_sizes(min(most, tokens, 2 * sequences), [sequences, tokens])


def graph_sizes(most: int, also: Iterable[int]) -> list[int]:
    """Numbers of tokens that get graphs, ascending; a batch between two of them is padded.

    Some of vLLM's, which are 8 tokens apart, and 16 from 256 on. Each costs a start as long as the host takes for three
    steps, and padding costs little: up to 128 tokens a step waits for weights, and takes as long for 16 more.

    Args:
        most: no graph has more.
        also: numbers of their own.
    """
    last = most // 8 * 8 if most < 256 else most // 16 * 16
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32), last, *also}
    return sorted(size for size in sizes if 0 < size <= most)
