"""vLLM's description of a batch for Mamba layers, and what it lacks for ours.

*States inside of prefills.* vLLM reserves a block for one such state of each prefill (it says "prefill checkpoint") and
asks the metadata's builder where it is. A prompt's reusable end then costs no step of its own.

*Short prefills* are described at fixed addresses as well, for `prefill_graphs`.

*Decodes in a CUDA graph* differ from one group of layers to the next in their slots alone, which the graph reads at one
address a group: one operation fetches them, where vLLM goes through all of the metadata. The 9B has ten groups.

*First tokens alone.* Model Runner V1 replays graphs of decodes for any batch of one token a sequence, prompts of one
token among them, which vLLM describes as prefills: nobody tells the graph. Here they are decodes from a state of zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.mamba.checkpoint import MambaPrefillCheckpointBuilder, MambaPrefillCheckpointMetadata
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata, Mamba2AttentionMetadataBuilder

from vllm_bamba.prefill_graphs import MOST, GroupPrefills, Run, shape_for, short_prefills
from vllm_bamba.prefix.options import active
from vllm_bamba.prefix.policy import inner_position
from vllm_bamba.state import INPUTS


@dataclass
class InnerStateMetadata(MambaPrefillCheckpointMetadata):
    """vLLM's, and what `state.InnerStates` has beyond it."""

    lengths: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    chunks: torch.Tensor | None = None


class InnerStateBuilder(MambaPrefillCheckpointBuilder):
    """With slots the state at a prefill's last unit is kept, else the one that vLLM's own caching wants."""

    def build(self, m: CommonAttentionMetadata, request_rows: list[int]) -> InnerStateMetadata | None:
        assert m.seq_lens_cpu_upper_bound is not None
        of_query, ends = m.query_start_loc_cpu.tolist(), m.seq_lens_cpu_upper_bound.tolist()
        first, device = of_query[request_rows[0]], m.query_start_loc.device
        starts = {row: ends[row] - (of_query[row + 1] - of_query[row]) for row in request_rows}
        found = self._at_last_unit(m, starts, ends) if active(self.vllm_config) else super().build(m, request_rows)
        if found is None:
            return None
        assert found.offsets is not None
        kept = [start + offset for start, offset in zip(starts.values(), found.offsets, strict=True)]
        places = [of_query[row] - first + offset for row, offset in zip(starts, found.offsets, strict=True)]
        inputs = [[max(place - i, 0) for i in range(INPUTS, 0, -1)] for place in places]
        return InnerStateMetadata(
            **{f.name: getattr(found, f.name) for f in fields(MambaPrefillCheckpointMetadata)},
            lengths=async_tensor_h2d(kept, dtype=torch.int32, device=device),
            inputs=async_tensor_h2d(inputs, dtype=torch.int64, device=device),
        )

    def _at_last_unit(
        self, m: CommonAttentionMetadata, starts: Mapping[int, int], ends: Sequence[int]
    ) -> MambaPrefillCheckpointMetadata | None:
        """As vLLM's `build`; `starts` has the tokens of each prefill's row before its new ones, `ends` with them."""
        if self.vllm_config.cache_config.hash_block_size is None:  # vLLM's memory profiling
            return None
        unit, offsets, columns = self.kv_cache_spec.block_size, [], []
        for row, start in starts.items():
            position = inner_position(start, ends[row], unit)
            offsets.append(position - start if position else 0)
            columns.append(position // unit - 1)
        if not any(offsets):
            return None
        to_device = partial(async_tensor_h2d, device=m.query_start_loc.device)
        nowhere = MambaPrefillCheckpointMetadata(
            checkpoint_offsets=to_device(offsets, dtype=torch.int32),
            state_indices=m.block_table_tensor,  # in the next line those that are meant
            offsets=offsets,
            request_rows=to_device([*starts], dtype=torch.int64),
            block_cols=to_device(columns, dtype=torch.int64),
        )
        return nowhere.regather_state_indices(m.block_table_tensor)


@dataclass
class StateMetadata(Mamba2AttentionMetadata):
    """vLLM's, and what our layers and other groups of them want to know.

    Attributes:
        short: the batch's prefills, if they are short; always the same for a group of layers.
        slot_columns: int64 [sequences, 1], where in its row of any group's block table each sequence's slot stands;
            None where no second group has asked, or decodes are not in a CUDA graph.
        first_rows: sequences of one token, whose states of zeros each group makes for itself, in a batch of one token a
            sequence for Model Runner V1.
    """

    short: GroupPrefills | None = None
    slot_columns: torch.Tensor | None = None
    first_rows: Sequence[int] = ()


class StateMetadataBuilder(Mamba2AttentionMetadataBuilder):
    """vLLM's, which keeps states where `InnerStateBuilder` says and describes short prefills for graphs."""

    metadata_cls = StateMetadata

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.checkpoint_builder = InnerStateBuilder(vllm_config, kv_cache_spec)
        self.short: GroupPrefills | None = None
        self._begins_decodes = not (self.use_spec_decode or vllm_config.use_v2_model_runner)
        self._layers = layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        graphs = vllm_config.speculative_config is None and all(layer.wants_graphs for layer in layers)
        if graphs and current_platform.is_cuda():
            slots = torch.zeros(2, MOST.sequences, dtype=torch.int32, device=device)
            self.short = GroupPrefills(short_prefills(self.chunk_size, device), slots)
            self._no_slots = torch.zeros(MOST.sequences, dtype=torch.int32, device=device)
            for layer in layers:
                layer.short = self.short

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
    ) -> StateMetadata:
        if first_rows := self._first_rows(common_attn_metadata):
            self._begin(common_attn_metadata.block_table_tensor, first_rows)
            nothing = torch.zeros_like(common_attn_metadata.is_prefilling)
            decodes = common_attn_metadata.replace(is_prefilling=nothing)
            return replace(super().build(common_prefix_len, decodes, *args, **kwargs), first_rows=first_rows)
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        inner = metadata.checkpoint_meta
        if isinstance(inner, InnerStateMetadata):
            inner = replace(inner, chunks=metadata.checkpoint_chunk_idx.int())
            metadata = replace(metadata, checkpoint_meta=inner)
        if self.short is None or not self._has_graph(metadata):
            return metadata
        self.short.prefills.fill(self._runs(common_attn_metadata, metadata))
        return self._with_short(metadata)

    def update_block_table(
        self, metadata: StateMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> StateMetadata:
        """The same batch for another group of layers."""
        if metadata.first_rows:
            self._begin(blk_table, metadata.first_rows)
        if self._is_for_graphs(metadata):
            assert len(blk_table) == metadata.num_decodes
            if metadata.slot_columns is None:
                metadata.slot_columns = self._slot_columns(metadata.seq_lens)
            slots = self.state_indices_tensor_d[: metadata.num_decodes]
            torch.gather(blk_table, 1, metadata.slot_columns, out=slots)
            of_group = copy.copy(metadata)
            of_group.state_indices_tensor_d = slots
            return of_group
        of_group = super().update_block_table(metadata, blk_table, slot_mapping)
        return of_group if metadata.short is None else self._with_short(of_group)

    def _first_rows(self, m: CommonAttentionMetadata) -> list[int]:
        """Sequences of one token in a batch that Model Runner V1 may take for one of decodes."""
        if m.max_query_len > 1 or not self._begins_decodes:
            return []
        assert m.is_prefilling is not None
        assert m.seq_lens_cpu_upper_bound is not None
        return (m.is_prefilling & (m.seq_lens_cpu_upper_bound == 1)).nonzero().flatten().tolist()

    def _begin(self, block_table: torch.Tensor, rows: Sequence[int]) -> None:
        """Fill the slots of sequences without a token with zeros, which is where a recurrence begins."""
        slots = block_table[rows, 0].long()
        for layer in self._layers:
            for state in layer.kv_cache:
                state[slots] = 0

    def _is_for_graphs(self, metadata: StateMetadata) -> bool:
        """Whether vLLM, too, would put the slots where CUDA graphs look for them."""
        fits = metadata.num_decodes <= self.decode_cudagraph_max_bs
        return metadata.num_prefills == 0 and fits and self.compilation_config.cudagraph_mode.has_full_cudagraphs()

    def _slot_columns(self, lengths: torch.Tensor) -> torch.Tensor:
        """Where vLLM's `mamba_get_block_table_tensor` finds slots, of sequences of `lengths` tokens."""
        if self.vllm_config.cache_config.mamba_cache_mode == "none":
            return torch.zeros_like(lengths, dtype=torch.int64).unsqueeze(1)
        return ((lengths - 1) // self.kv_cache_spec.block_size).clamp_(min=0).long().unsqueeze(1)

    def _has_graph(self, metadata: StateMetadata) -> bool:
        """Whether there is one for the batch's prefills; without vLLM's piecewise graphs none is made."""
        shape = shape_for(metadata.num_prefills, metadata.num_prefill_tokens)
        return shape is not None and self._layers[0].graphs.made

    def _runs(self, m: CommonAttentionMetadata, metadata: StateMetadata) -> list[Run]:
        """The batch's prefills, which stand behind its decodes."""
        assert m.seq_lens_cpu_upper_bound is not None
        of_query, ends = m.query_start_loc_cpu.tolist(), m.seq_lens_cpu_upper_bound.tolist()
        first, inner = metadata.num_reqs - metadata.num_prefills, metadata.checkpoint_meta
        offsets = [0] * metadata.num_prefills if inner is None else inner.offsets
        runs = []
        for row, offset in enumerate(offsets, first):
            tokens = of_query[row + 1] - of_query[row]
            runs.append(Run(ends[row] - tokens, tokens, offset))
        return runs

    def _with_short(self, metadata: StateMetadata) -> StateMetadata:
        """The same, with the slots of this group's layers where graphs look for them."""
        assert self.short is not None
        inner, nobody = metadata.checkpoint_meta, self._no_slots[metadata.num_prefills :]
        kept = self._no_slots[: metadata.num_prefills] if inner is None else inner.state_indices
        torch.cat([metadata.state_indices_tensor_p, nobody, kept, nobody], out=self.short.slots.view(-1))
        return replace(metadata, short=self.short)
