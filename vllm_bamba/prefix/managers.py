"""vLLM's cache managers for Bamba: states keyed exactly where they are, attention keyed at every unit.

vLLM finds a manager through the type of a layer's cache specification; both are registered when this module is
imported, in the engine and in its workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.request import Request

from vllm_bamba.compat import add_key, key_of, register_manager
from vllm_bamba.prefix.slots import Slots

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

AHEAD = 64  # columns of a block table that an answer in place is given at a time


@dataclass(frozen=True)
class BambaStateSpec(MambaSpec):
    """A Mamba layer's state, one block for every `block_size` tokens."""

    @property
    def state_content_size_bytes(self) -> int:
        """All bytes of the page: see `compat`'s table on copies that were cut short."""
        return self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class BambaAttentionSpec(FullAttentionSpec):
    """An attention layer's keys and values; differs from vLLM's in its manager only."""


class BambaStateManager(MambaManager):
    """Keys a state block where, and only where, a step ends on its last token or keeps the state there in passing.

    The block at a position then holds the state after exactly that many tokens, and no later step writes to it.

    Anchored slots (`state.SlotFormat`) have a third way: an answer goes on in one and the same block. Here it stays the
    request's last; in the worker's block table it stands in all columns to come, of which the worker is told some in
    advance. When the answer ends the block still has the state at the last unit, and is keyed; a step that is in flight
    then does not change that. Without anchors an answer goes on like that where there are no blocks to move to, and
    leaves no slot.
    """

    def __init__(self, kv_cache_spec: Any, block_pool: BlockPool, **kwargs: Any):
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.slots = Slots.of(block_pool)
        self.slots.states.append(self)
        self._last_block: dict[str, int] = {}  # of each request, the block of its last token that is done
        self._columns: dict[str, int] = {}  # of each answer in place, columns that the worker has been told

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        if new_computed_blocks:
            self.slots.hit(request_id, key_of(new_computed_blocks[-1]))
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)

    def _needs_internal_checkpoint(self, request_id: str, *args: Any, **kwargs: Any) -> bool:
        return self.slots.inner(request_id) > 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if self.stays(request_id, num_tokens_main_model - 1):
            return 0
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            *args,
            **kwargs,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        if self.stays(request_id, num_tokens_main_model - 1):
            return self.go_on(request_id, num_tokens_main_model - 1)
        allocated = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if allocated:
            self.slots.step.appended.add(request_id)
        return allocated

    def stays(self, request_id: str, tokens: int) -> bool:
        """Whether an answer in place, of so many tokens and one to come, is past its block's unit and keeps the block.

        No prefill gets here: it ends at `prefilled` or one token later.
        """
        blocks = self.req_to_blocks[request_id]
        return (
            self.slots.goes_on_in_place(request_id)
            and tokens >= len(blocks) * self.block_size
            and tokens > self.slots.requests[request_id].prefilled
            and self.block_pool.is_block_writable(blocks[-1])
        )

    def columns(self, request_id: str) -> int:
        """How many columns of the request's block table the worker has been told."""
        return self._columns.get(request_id, len(self.req_to_blocks[request_id]))

    def lacks_column(self, request_id: str, tokens: int) -> bool:
        """Whether the worker has not been told the column of such an answer's next token."""
        return tokens >= self.columns(request_id) * self.block_size

    def go_on(self, request_id: str, tokens: int) -> list[KVCacheBlock]:
        """What the worker is to be told of such an answer: its block, once for each further column of its table."""
        if not self.lacks_column(request_id, tokens):
            return []
        columns = self.columns(request_id)
        more = min(AHEAD, self.slots.columns - columns)
        self._columns[request_id] = columns + more
        return self.req_to_blocks[request_id][-1:] * more

    def stand_at(self, request_id: str, tokens: int) -> None:
        """Have a request's last block stand where the last of so many tokens is: the worker is told of all again."""
        blocks = self.req_to_blocks[request_id]
        missing = -(-tokens // self.block_size) - len(blocks)
        if missing > 0:  # of an answer in place
            blocks[-1:] = [self._null_block] * missing + blocks[-1:]
        self._columns.pop(request_id, None)

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, where a block may have to be given back: those before that of the last token that is done.

        Before the block of the last call there are none any more.
        """
        blocks = self.req_to_blocks[request_id]
        done = min(processed_computed_tokens, len(blocks) * self.block_size)  # an answer in place stays in the last one
        last, before = (done - 1) // self.block_size, self._last_block.get(request_id, 0)
        self._last_block[request_id] = max(last, before)
        if not all(block.is_null for block in blocks[before : max(last, 0)]):
            super().remove_skipped_blocks(request_id, done, *args, **kwargs)

    def is_settled(self, request_id: str) -> bool:
        """Whether the request has no block before its last one."""
        return self._last_block.get(request_id) == len(self.req_to_blocks[request_id]) - 1

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._last_block.pop(request_id, None)
        self._columns.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def leave(self, request: Request, unit: int) -> None:
        """Have the state at an answer's last unit found; its block, the last, is anchored or ends there."""
        self._key(request, unit, self.req_to_blocks[request.request_id][-1])

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        self.num_cached_block[request.request_id] = num_tokens // self.block_size
        blocks = self.req_to_blocks[request.request_id]
        in_place = self.slots.goes_on_in_place(request.request_id)  # anchored ones leave a slot when they end
        last = self.slots.requests[request.request_id].prefilled if in_place else num_tokens
        for position in (self.slots.inner(request.request_id), num_tokens):
            if 0 < position <= min(last, len(blocks) * self.block_size) and position % self.block_size == 0:
                self._key(request, position, blocks[position // self.block_size - 1])

    def _key(self, request: Request, num_tokens: int, block: KVCacheBlock) -> None:
        """Have the state after that many of the request's tokens found, if it becomes a slot."""
        hash_index = num_tokens // self.block_pool.hash_block_size - 1
        if block.is_null or block.block_hash is not None or hash_index >= len(request.block_hashes):
            return
        key = request.block_hashes[hash_index]
        if not self.slots.admits(request, num_tokens, key):
            return
        hashed = add_key(self.block_pool, block, key, self.kv_cache_group_id, num_tokens)
        self.cached_blocks_this_step.add(hashed)  # computed in this step: nobody may start from it before the next
        self.slots.add_state(key, block)


class BambaAttentionManager(FullAttentionManager):
    """Keys attention blocks at every unit, so that any position can be hit and every parting is seen."""

    def __init__(self, kv_cache_spec: Any, block_pool: BlockPool, **kwargs: Any):
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.slots = Slots.of(block_pool)
        self.slots.attention = self
        self.unit = 2 * block_pool.hash_block_size
        self._keyed: dict[str, int] = {}  # tokens up to which a request's blocks have keys
        self._keyed_in_step: defaultdict[str, list[KVCacheBlock]] = defaultdict(list)

    def blocks_of(self, request_id: str, position: int) -> list[KVCacheBlock]:
        """The blocks that hold the request's first `position` tokens."""
        return self.req_to_blocks[request_id][: -(-position // self.block_size)]

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._keyed_in_step.clear()
        self.slots.new_step()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if num_local_computed_tokens % self.block_size and new_computed_blocks:
            tail = new_computed_blocks[-1]
            if any(tail is block for blocks in self._keyed_in_step.values() for block in blocks):
                # this step writes the block that a hit would copy before the step: more than there is, so wait
                return self.block_pool.num_gpu_blocks + 1
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        request_id = request.request_id
        full_before = self.num_cached_block.get(request_id, 0)
        # not FullAttentionManager's, whose one key inside the last block would remove those that stand there
        SingleTypeKVCacheManager.cache_blocks(self, request, num_tokens, *args, **kwargs)
        full = self.num_cached_block.get(request_id, 0)
        for index in range(full_before, full):  # becoming full has removed the keys inside
            self._key(request, index, index * self.block_size, (index + 1) * self.block_size - 1)
        self._key_last_block(request, num_tokens, full)

    def cache_answer(self, request: Request, num_tokens: int) -> None:
        """As `cache_blocks`, where the request's last block does not get full."""
        full = self.num_cached_block.get(request.request_id, 0)
        assert num_tokens // self.block_size == full
        self._key_last_block(request, num_tokens, full)

    def _key_last_block(self, request: Request, num_tokens: int, full: int) -> None:
        """Key the block behind the `full` ones at every unit that has come."""
        request_id = request.request_id
        end = min(num_tokens, len(request.block_hashes) * self.block_pool.hash_block_size) // self.unit * self.unit
        if end > full * self.block_size:
            start = max(self._keyed.get(request_id, 0), full * self.block_size)
            self._key(request, full, start, end)
        self._keyed[request_id] = end

    def _key(self, request: Request, index: int, after: int, up_to: int) -> None:
        """Key one block at every unit of the request's tokens after one position and up to another."""
        block = self.req_to_blocks[request.request_id][index]
        unit_after = (after // self.unit + 1) * self.unit
        positions = range(unit_after, up_to + 1, self.unit)
        for position in positions:
            hashed = request.block_hashes[position // self.block_pool.hash_block_size - 1]
            add_key(self.block_pool, block, hashed, self.kv_cache_group_id, position)
        if positions:
            self._keyed_in_step[request.request_id].append(block)

    def go_on(self, request_id: str, tokens: int) -> list[KVCacheBlock]:
        """As `BambaStateManager.go_on`; nothing, since the next token has room in the last block."""
        return []

    def keyed_in_this_step(self, request_id: str) -> list[KVCacheBlock]:
        return self._keyed_in_step.get(request_id, [])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._keyed.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        self.slots.finish(request_id, blocks)
        return blocks


class Place(NamedTuple):
    """How far vLLM has gone through the groups for a request.

    Attributes:
        allocated, keyed, freed: in multiples of some number of tokens.
        settled: whether there was nothing left to give back, nor will be while an anchored answer stays in its block.
    """

    allocated: int
    keyed: int
    freed: int
    settled: bool


class NoBlocks(KVCacheBlocks):
    """What most requests get in a step; vLLM's looks at all groups to find that there is nothing."""

    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        return None if allow_none else super().get_block_ids(**kwargs)


class OnlyWhereDue:
    """Has vLLM go through all groups, and all blocks, of a request only where there is something to do.

    vLLM asks every group, for every token, what to allocate, what to give back and what to key. The answer is
    "nothing" until the request passes a multiple of `grain` tokens: with slots, an answer does in one or two steps of
    sixteen, and without caching in one or two of hundreds. An anchored answer that stays in its blocks passes such a
    multiple without all that.

    Who has nothing yet gets nothing either, as if blocks were lacking, unless the step `takes_prefill`.
    """

    def __init__(self, manager: KVCacheManager, takes_prefill: Callable[[Request], bool]):
        self.manager = manager
        self.takes_prefill = takes_prefill
        self.slots: Slots | None = None
        longest = manager.max_model_len
        self.grain = gcd(*(size for size in manager.coordinator.group_block_sizes if size < longest)) or longest
        self._nothing = NoBlocks(manager.empty_kv_cache_blocks.blocks)
        self._places: dict[str, Place] = {}
        self._allocate, self._cache = manager.allocate_slots, manager.cache_blocks
        manager.allocate_slots = self.allocate_slots  # type: ignore[method-assign]
        manager.cache_blocks = self.cache_blocks  # type: ignore[method-assign]
        manager.estimate_cached_tokens = self.estimate_cached_tokens  # type: ignore[method-assign]

    def allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, **more: Any
    ) -> KVCacheBlocks | None:
        start, request_id = request.num_computed_tokens + num_new_computed_tokens, request.request_id
        end = start + num_new_tokens
        known = min(end, request.num_tokens)
        done = max(start - request.num_in_flight_tokens, 0)
        before = self._places.get(request_id)
        if before is None and not self.takes_prefill(request):
            return None
        allocated, keyed, freed = (end - 1) // self.grain, known // self.grain, (done - 1) // self.grain
        settled = before is not None and before.settled
        blocks: KVCacheBlocks = self._nothing
        if before is not None and before.allocated == allocated and before.keyed == keyed:
            if before.freed != freed and not settled:
                settled = self._give_back(request, done)
        elif self.slots is not None and self.slots.stays(request_id, end - 1):
            settled = settled or self._give_back(request, done)
            blocks = self._columns_in_place(self.slots, request, end - 1)
            self.slots.text.cache_answer(request, known)
        else:
            given = self.ask(request, num_new_tokens, num_new_computed_tokens, **more)
            if given is None:
                return None
            blocks, settled = given, False
        self._places[request_id] = Place(allocated, keyed, freed, settled)
        return blocks

    def _columns_in_place(self, slots: Slots, request: Request, tokens: int) -> KVCacheBlocks:
        """What the worker is to be told of an answer that stays in its blocks, which is nothing in most steps."""
        if not slots.states[0].lacks_column(request.request_id, tokens):
            return self._nothing
        managers: Any = self.manager.coordinator.single_type_managers
        return self.manager.create_kv_cache_blocks(tuple(m.go_on(request.request_id, tokens) for m in managers))

    def ask(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, **more: Any
    ) -> KVCacheBlocks | None:
        """All groups; where one lacks blocks an answer may do without."""
        given = self._allocate(request, num_new_tokens, num_new_computed_tokens, **more)
        tokens = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens - 1
        if given is None and self.slots is not None and self.slots.keep_in_place(request.request_id, tokens):
            given = self._allocate(request, num_new_tokens, num_new_computed_tokens, **more)
        return given

    def _give_back(self, request: Request, done: int) -> bool:
        """What `done` tokens do not need any more; returns whether that is all there will be while an answer stays."""
        self.manager.remove_skipped_blocks(request.request_id, done, request.num_prompt_tokens)
        return self.slots is not None and all(state.is_settled(request.request_id) for state in self.slots.states)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        place = self._places.get(request.request_id)
        if place is None or place.keyed != num_computed_tokens // self.grain:
            self._cache(request, num_computed_tokens)

    def forget(self, request: Request) -> None:
        """The request gives back all that it has."""
        self._places.pop(request.request_id, None)

    def estimate_cached_tokens(self, request: Request) -> int:
        """As vLLM's, which looks at all blocks: the tokens up to which each group has a key, at the first token."""
        groups = self.manager.get_blocks(request.request_id).blocks
        keyed = ((block.block_hash_num_tokens for block in reversed(blocks) if block.block_hash) for blocks in groups)
        return min(next(of_group, None) or 0 for of_group in keyed)


register_manager(BambaStateSpec, BambaStateManager, MambaSpec)
register_manager(BambaAttentionSpec, BambaAttentionManager, FullAttentionSpec)
