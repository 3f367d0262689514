"""What vLLM's Model Runner V2 does to states between steps, without what only speculation needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState


@dataclass
class Moves:
    """The requests of a batch whose states go on in another block, as much of an `InputBatch` as vLLM reads of them.

    Attributes:
        num_reqs: how many.
        idx_mapping: integers [num_reqs], rows of the request table.
        query_start_loc: integers [num_reqs + 1], where each one's new tokens would begin if there were no others.
    """

    num_reqs: int
    idx_mapping: torch.Tensor
    query_start_loc: torch.Tensor


class BambaModelState(MambaHybridModelState):
    """vLLM's, which without drafts launches fewer and smaller kernels.

    Before and after every step vLLM launches programs for every request, layer and part of a state, and leaves it to
    them to find that there is nothing to do: it takes what the host knows of requests' lengths for upper bounds. Only
    rejected tokens make them that. Without drafts they are exact, so the host can say which requests pass the end of a
    block in a step, and nothing is left to do behind it.
    """

    def __init__(self, vllm_config: Any, *args: Any):
        super().__init__(vllm_config, *args)
        self.takes_back = vllm_config.num_speculative_tokens > 0 or self.recoverssm is not None

    def preprocess_state(self, input_batch: Any, *args: Any) -> None:
        """Have states copied to the blocks in which this step writes them."""
        if self._align_mode and not self.takes_back:
            input_batch = self.moves(input_batch)
        if input_batch is not None:
            super().preprocess_state(input_batch, *args)

    def postprocess_state(self, *args: Any) -> None:
        """Have rejected tokens taken back."""
        if self.takes_back:
            super().postprocess_state(*args)

    def moves(self, input_batch: Any) -> Moves | None:
        """Of a batch; None where all states stay."""
        block, new = self.cache_config.mamba_block_size, input_batch.num_scheduled_tokens
        before = input_batch.num_computed_tokens_np
        moved = np.flatnonzero((before - 1) // block != (before + new - 1) // block)
        if not len(moved):
            return None
        rows, starts = input_batch.idx_mapping_np[moved], np.concatenate([[0], np.cumsum(new[moved])])

        def like(tensor: torch.Tensor, values: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(values, dtype=tensor.dtype, device=tensor.device)

        return Moves(len(moved), like(input_batch.idx_mapping, rows), like(input_batch.query_start_loc, starts))
