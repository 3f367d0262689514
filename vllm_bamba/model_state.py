"""What vLLM's Model Runner V2 does to states between steps, and says of them, without what only speculation needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_bamba.mixer import BambaMixer
from vllm_bamba.mixing import FusedMixing

if TYPE_CHECKING:
    from vllm_bamba.ops.slot_state import LayerSlots


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
    """vLLM's, which without drafts launches fewer and smaller kernels, and describes a batch of decodes once.

    Before and after every step vLLM launches programs for every request, layer and part of a state, and leaves it to
    them to find that there is nothing to do: it takes what the host knows of requests' lengths for upper bounds. Only
    rejected tokens make them that. Without drafts they are exact, so the host can say which requests pass the end of a
    block in a step, and nothing is left to do behind it.

    Anchored slots (`state.SlotFormat`) are moved, or stay, with their rings folded, by a kernel of our own.

    CUDA graphs of decodes read from fixed addresses which slots they work on. What stands there stays right while the
    same requests decode and get no blocks, so the groups of Mamba layers, ten of the 9B, are not asked for it again.
    """

    def __init__(self, vllm_config: Any, model: Any, *args: Any):
        super().__init__(vllm_config, model, *args)
        self.takes_back = vllm_config.num_speculative_tokens > 0 or self.recoverssm is not None
        ways = {mixer.prefix: mixer.mixing for mixer in model.modules() if isinstance(mixer, BambaMixer)}
        self.anchored = {name: way for name, way in ways.items() if isinstance(way, FusedMixing) and way.form.anchored}
        self.slots: LayerSlots | None = None
        # how many each request has, the same in all groups of Mamba layers; None with drafts
        self._blocks: np.ndarray | None = None
        self._real: Any = None  # the batch that `preprocess_state` was called with
        self._decodes: tuple[Any, ...] = ()  # the last batch, if it was of decodes in a CUDA graph
        self._described: dict[str, Any] = {}  # what it was to each layer

    def add_request(self, *args: Any) -> None:
        """As vLLM's; its row of the request table may have been another's."""
        super().add_request(*args)
        self._decodes = ()

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """As vLLM's, and note where anchored slots are."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        of_states = [i for i, spec in enumerate(specs) if isinstance(spec, MambaSpec)]
        if of_states and not self.takes_back:
            self._blocks = block_tables.num_blocks.np[of_states[0]]
        if not self.anchored:
            return
        from vllm_bamba.ops.slot_state import LayerSlots

        groups = enumerate(kv_cache_config.kv_cache_groups)
        group_of = {name: i for i, group in groups for name in group.layer_names if name in self.anchored}
        ways, used = [self.anchored[name] for name in group_of], sorted(set(group_of.values()))
        self.slots = LayerSlots.of(
            [way.slots for way in ways],
            [way.mixer.A for way in ways],
            [used.index(group) for group in group_of.values()],
            [block_tables.input_block_tables[group] for group in used],
        )

    def preprocess_state(self, input_batch: Any, *args: Any) -> None:
        """Have states in the blocks in which this step writes them."""
        self._real = input_batch
        if self._align_mode and not self.takes_back:
            moved = self.moved(input_batch)
            if not len(moved):
                return
            if self.slots is not None:
                self._fold(self.slots, input_batch, moved)
                return
            input_batch = self.moves(input_batch, moved)
        super().preprocess_state(input_batch, *args)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As vLLM's, without Mamba layers where they know already."""
        decodes = self.decodes(input_batch, cudagraph_mode)
        known = bool(decodes) and decodes == self._decodes
        self._decodes = ()  # if what follows fails
        if known:
            attn_groups = [[g for g in of if not isinstance(g.kv_cache_spec, MambaSpec)] for of in attn_groups]
        metadata = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
        )
        if known:
            metadata = self._described | metadata
        self._decodes, self._described = decodes, metadata
        return metadata

    def decodes(self, input_batch: Any, cudagraph_mode: CUDAGraphMode) -> tuple[Any, ...]:
        """What decides on which slots a batch of decodes in a CUDA graph works; empty for any other batch.

        Graphs of whole batches are of decodes only: Mamba layers have no others.
        """
        if self._blocks is None or input_batch is not self._real or cudagraph_mode != CUDAGraphMode.FULL:
            return ()
        rows = input_batch.idx_mapping_np
        return input_batch.num_reqs_after_padding, rows.tobytes(), self._blocks[rows].tobytes()

    def postprocess_state(self, *args: Any) -> None:
        """Have rejected tokens taken back."""
        if self.takes_back:
            super().postprocess_state(*args)

    def moved(self, input_batch: Any) -> np.ndarray:
        """Which of a batch's requests go on in another block."""
        block, new = self.cache_config.mamba_block_size, input_batch.num_scheduled_tokens
        before = input_batch.num_computed_tokens_np
        return np.flatnonzero((before - 1) // block != (before + new - 1) // block)

    def moves(self, input_batch: Any, moved: np.ndarray) -> Moves:
        """Those requests as a batch for vLLM's own kernels."""
        rows = input_batch.idx_mapping_np[moved]
        starts = np.concatenate([[0], np.cumsum(input_batch.num_scheduled_tokens[moved])])

        def like(tensor: torch.Tensor, values: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(values, dtype=tensor.dtype, device=tensor.device)

        return Moves(len(moved), like(input_batch.idx_mapping, rows), like(input_batch.query_start_loc, starts))

    def _fold(self, slots: LayerSlots, input_batch: Any, moved: np.ndarray) -> None:
        """Have their states in the new slots, with rings folded; a request that only begins has none."""
        from vllm_bamba.ops.slot_state import move_slots

        before = input_batch.num_computed_tokens_np[moved]
        moved, before = moved[before > 0], before[before > 0]
        if not len(moved):
            return
        block, after = self.cache_config.mamba_block_size, before + input_batch.num_scheduled_tokens[moved]
        moves = np.stack([moved, before, (before - 1) // block, (after - 1) // block], 1)
        move_slots(slots, async_tensor_h2d(moves, dtype=torch.int32, device=self.device))
