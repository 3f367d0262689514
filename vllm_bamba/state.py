"""What one sequence keeps between steps, and where a batch's sequences keep it.

A *slot* is one row of the layer's two state tensors: the last inputs of the convolution and the SSM state. vLLM hands
out slots (it calls them blocks; block 0 is padding) and describes each batch; `plan_batch` turns that description into
at most one decode plan and one prefill plan, whose fields are always there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_bamba.compat import Mamba2AttentionMetadata, MambaStateDtypeCalculator, is_conv_state_dim_first
from vllm_bamba.config import BambaShape
from vllm_bamba.sharding import MixerShard

if TYPE_CHECKING:
    from vllm.config import CacheConfig


@dataclass(frozen=True)
class DecodePlan:
    """One token (with speculation: a few) for each of a number of sequences that have a state.

    Attributes:
        num_tokens: tokens, the first of the batch.
        slots: int32 [sequences, 1 + draft tokens]; 0 where a CUDA graph pads the batch. The fused step uses the first.
        lengths: int32 [sequences], tokens of each sequence with this step's.
        query_start_loc: int32 [sequences + 1] with speculation, else None (one token a sequence).
        accepted: int32 [sequences], tokens of the last step that were accepted; None without speculation.
    """

    num_tokens: int
    slots: torch.Tensor
    lengths: torch.Tensor
    query_start_loc: torch.Tensor | None
    accepted: torch.Tensor | None


INPUTS = 3  # of a convolution that a state needs, at most


@dataclass(frozen=True)
class InnerStates:
    """States inside of a batch's prefills that are kept as well, at most one of each sequence.

    Attributes:
        slots: int32 [sequences]; 0: nothing is kept.
        lengths: int32 [sequences], tokens of each sequence up to there.
        inputs: integers [sequences, INPUTS], which of the batch's prefill tokens are the last of these.
        chunks: int32 [sequences], the chunk that ends there.
        offsets: new tokens of each sequence up to there, known without asking the device; 0: nothing is kept. For CPUs.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    inputs: torch.Tensor
    chunks: torch.Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class PrefillPlan:
    """A run of tokens for each of a number of sequences, packed one after the other.

    Attributes:
        num_tokens: tokens, the last of the batch.
        slots: int32 [sequences].
        lengths: int32 [sequences], tokens of each sequence with these.
        query_start_loc: int32 [sequences + 1], token offsets.
        continues: bool [sequences], whether the slot holds the state of earlier tokens.
        any_continues: false only if none of `continues`, known without asking the device.
        chunk_size: tokens of an SSD chunk.
        chunk_start_loc: int32 [chunks + 1], token offsets; no chunk crosses sequences.
        chunk_sequence: int32 [chunks].
        last_chunk: int32 [sequences], the chunk that ends each sequence.
        conv_metadata: what vLLM's Triton convolution wants to know of the launch.
        inner: states inside of the runs that are kept, too; None where there are none.
    """

    num_tokens: int
    slots: torch.Tensor
    lengths: torch.Tensor
    query_start_loc: torch.Tensor
    continues: torch.Tensor
    any_continues: bool
    chunk_size: int
    chunk_start_loc: torch.Tensor
    chunk_sequence: torch.Tensor
    last_chunk: torch.Tensor
    conv_metadata: object
    inner: InnerStates | None = None

    @classmethod
    def of_one_chunk(cls, chunk_size: int, continues: bool, device: torch.device) -> PrefillPlan:
        """One sequence in slot 0, as long as a chunk; the convolution takes that slot for padding and skips it."""
        first = torch.zeros(1, dtype=torch.int32, device=device)
        offsets = torch.cat([first, first + chunk_size])
        return cls(
            num_tokens=chunk_size,
            slots=first,
            lengths=first + chunk_size * (1 + continues),
            query_start_loc=offsets,
            continues=torch.tensor([continues], device=device),
            any_continues=continues,
            chunk_size=chunk_size,
            chunk_start_loc=offsets,
            chunk_sequence=first,
            last_chunk=first,
            conv_metadata=None,
        )


def plan_batch(metadata: Mamba2AttentionMetadata) -> tuple[DecodePlan | None, PrefillPlan | None]:
    """The batch's decode tokens, which come first, and its prefill tokens."""
    decode = prefill = None
    if metadata.num_decodes > 0:
        decode = DecodePlan(
            num_tokens=metadata.num_decode_tokens,
            slots=metadata.state_indices_tensor_d,
            lengths=metadata.seq_lens[: metadata.num_decodes],
            query_start_loc=metadata.query_start_loc_d,
            accepted=metadata.num_accepted_tokens,
        )
    if metadata.num_prefills > 0:
        prefill = PrefillPlan(
            num_tokens=metadata.num_prefill_tokens,
            slots=metadata.state_indices_tensor_p,
            lengths=metadata.seq_lens[metadata.num_decodes : metadata.num_decodes + metadata.num_prefills],
            query_start_loc=metadata.query_start_loc_p,
            continues=metadata.has_initial_states_p,
            any_continues=metadata.prep_initial_states,
            chunk_size=metadata.chunk_size,
            chunk_start_loc=metadata.cu_chunk_seqlen_p,
            chunk_sequence=metadata.seq_idx_p,
            last_chunk=metadata.last_chunk_indices_p,
            conv_metadata=metadata,
            inner=_inner_states(metadata),
        )
    return decode, prefill


def _inner_states(metadata: Mamba2AttentionMetadata) -> InnerStates | None:
    """Those that the metadata's builder, `state_metadata.StateMetadataBuilder`, found."""
    inner: Any = metadata.checkpoint_meta
    if inner is None:
        return None
    return InnerStates(inner.state_indices, inner.lengths, inner.inputs, inner.chunks, tuple(inner.offsets))


def state_shapes(
    shape: BambaShape, tensor_parallel: int, draft_tokens: int
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of one slot on one rank: convolution inputs, and SSM state [heads, head_dim, state].

    The convolution's is [channels, inputs] or, by vLLM's default, [inputs, channels]; with speculation it keeps
    `draft_tokens` more inputs, so that rejected ones can be taken back.
    """
    shard = mixer_shard(shape, tensor_parallel)
    conv = (shard.local_conv_channels, shape.conv_width - 1 + draft_tokens)
    ssm = (shard.local_heads, shape.mamba_head_dim, shape.mamba_state)
    return conv if is_conv_state_dim_first() else (conv[1], conv[0]), ssm


def state_dtypes(model_dtype: torch.dtype, cache_config: CacheConfig) -> tuple[torch.dtype, torch.dtype]:
    """Precision of one slot's two tensors: convolution inputs and SSM state."""
    return MambaStateDtypeCalculator.mamba2_state_dtype(
        model_dtype, cache_config.mamba_cache_dtype, cache_config.mamba_ssm_cache_dtype
    )


def mixer_shard(shape: BambaShape, tensor_parallel: int, rank: int = 0) -> MixerShard:
    """The part of `shape`'s mixers that one rank holds."""
    return MixerShard(
        heads=shape.mamba_heads,
        head_dim=shape.mamba_head_dim,
        groups=shape.mamba_groups,
        state=shape.mamba_state,
        size=tensor_parallel,
        rank=rank,
    )


def channels_first(conv_state: torch.Tensor) -> torch.Tensor:
    """View [slots, channels, inputs] of the convolution's state, however vLLM lays it out."""
    return conv_state if is_conv_state_dim_first() else conv_state.transpose(-1, -2)


# dtypes of a checkpoint with a scale for every channel of a head, by the name that users give
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class FusedSlots(NamedTuple):
    """The slots of a layer as the fused step keeps them; layout and reasons in ops/README.md.

    Attributes:
        conv: [slots, width + drafts, channels], the convolution's inputs; position t is entry t % (width + drafts).
        ssm: [slots, heads, head_dim, state], the checkpoint.
        scale: fp32 [slots, heads, head_dim] of an 8-bit checkpoint, else None.
        ring_x: [slots, heads, replay, head_dim], x of the tokens after the checkpoint; None without replay.
        ring_b: [slots, replay, groups * state], their B.
        ring_dt: fp32 [slots, heads, replay], their time steps; 0: an empty entry.
        anchor_conv: [slots, width - 1, channels], the convolution's inputs before the anchor; None without one.
        anchor: int32 [slots, 16], in the first number the tokens that the checkpoint has seen in all heads.
        drafts: tokens of a step that can be taken back.
    """

    conv: torch.Tensor
    ssm: torch.Tensor
    scale: torch.Tensor | None = None
    ring_x: torch.Tensor | None = None
    ring_b: torch.Tensor | None = None
    ring_dt: torch.Tensor | None = None
    anchor_conv: torch.Tensor | None = None
    anchor: torch.Tensor | None = None
    drafts: int = 0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All of them."""
        return self[:8]

    @property
    def of_step(self) -> tuple[torch.Tensor | None, ...]:
        """Those that a decode step works with."""
        return self[:6]

    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        heads, head_dim, state = self.ssm.shape[1:]
        groups, rest = divmod(self.conv.shape[2] - heads * head_dim, 2 * state)
        assert rest == 0
        return {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "GROUPS": groups,
            "STATE": state,
            "WIDTH": self.conv.shape[1] - self.drafts,
            "REPLAY": 0 if self.ring_dt is None else self.ring_dt.shape[2],
            "DRAFTS": self.drafts,
            "QUANTISED": self.scale is not None,
        }


def slot_strides(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    """Elements from slot to slot of each tensor of `FusedSlots`; 0 for those that a format lacks."""
    return [0 if t is None else t.stride(0) for t in tensors]


@dataclass(frozen=True)
class SlotFormat:
    """Sizes and dtypes of `FusedSlots` on one rank.

    Attributes:
        shard: this rank's part of the mixer.
        width: of the convolution.
        dtype: of the convolution's inputs, x and B: that of activations unless the user chose another.
        state_dtype: of the checkpoint: fp32, bf16, fp16 or one of `EIGHT_BITS`.
        replay: tokens that the ring holds; 0 without one.
        anchored: whether all heads fold at once, where `slot_state.move_slots` does it, and the slot says where: what
            the sequence had there is found in the slot until the next time.
        drafts: tokens that can be taken back after a step, of a ring of more than twice as many; not of anchored slots.
    """

    shard: MixerShard
    width: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    replay: int
    anchored: bool = False
    drafts: int = 0

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one slot and dtype of each tensor, in the order in which they lie in a slot."""
        shard = self.shard
        heads, head_dim = shard.local_heads, shard.head_dim
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "conv": ((self.width + self.drafts, shard.local_conv_channels), self.dtype),
            "ssm": ((heads, head_dim, shard.state), self.state_dtype),
        }
        if self.state_dtype in EIGHT_BITS.values():
            tensors["scale"] = ((heads, head_dim), torch.float32)
        if self.replay:
            tensors["ring_x"] = ((heads, self.replay, head_dim), self.dtype)
            tensors["ring_b"] = ((self.replay, shard.local_bc), self.dtype)
            tensors["ring_dt"] = ((heads, self.replay), torch.float32)
        if self.anchored:
            tensors["anchor_conv"] = ((self.width - 1, shard.local_conv_channels), self.dtype)
            tensors["anchor"] = ((16,), torch.int32)  # one is used; slots stay multiples of 64 bytes
        return tensors

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """One slot as vLLM sees it: the convolution's inputs, then the bytes of all the rest.

        vLLM copies the two when it moves a sequence to another slot, if that is not anchored; what is in the bytes is
        nobody's business.
        """
        (conv, _), *rest = self.tensors().values()
        return conv, (sum(_bytes(shape, dtype) for shape, dtype in rest),)

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtype, torch.int8

    def empty(self, slots: int, device: torch.device | str) -> FusedSlots:
        """Uninitialised slots outside of vLLM's cache, each tensor in memory of its own."""
        made = {name: torch.empty(slots, *s, dtype=dtype, device=device) for name, (s, dtype) in self.tensors().items()}
        return FusedSlots(**made, drafts=self.drafts)

    def bind(self, states: tuple[torch.Tensor, ...]) -> FusedSlots:
        """The tensors inside of what vLLM made for `shapes()` and `dtypes()`."""
        conv, rest = states
        tensors, start = {"conv": conv}, 0
        for name, (shape, dtype) in list(self.tensors().items())[1:]:
            size = _bytes(shape, dtype)
            tensors[name] = rest[:, start : start + size].view(dtype).view(-1, *shape)
            start += size
        return FusedSlots(**tensors, drafts=self.drafts)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
