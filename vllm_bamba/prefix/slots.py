"""The slots of one engine: which of vLLM's blocks each one holds.

A slot is one state block of every Mamba group and the attention blocks of the text before it. They live and die
together: a slot that goes takes along every attention block that no other slot and no request needs, and what has
gone stands first in the queue of free blocks, so that nothing of use is taken while something useless is left.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm_bamba.compat import before_allocation, free_blocks_in_order, move_to_front, remove_keys
from vllm_bamba.prefix.policy import Key, Kind, SlotTable

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_bamba.prefix.managers import BambaAttentionManager, BambaStateManager


@dataclass
class OfStep:
    """What is known of the step that is being scheduled.

    Attributes:
        inner: of each request that it prefills, the position at which it leaves the state, too; 0: nowhere.
        appended: requests whose states got a block, which only this step will fill.
        decided: of a request and a position, whether the state there becomes a slot.
        made: the slots that each request leaves.
    """

    inner: dict[str, int] = field(default_factory=dict)
    appended: set[str] = field(default_factory=set)
    decided: dict[tuple[str, int], bool] = field(default_factory=dict)
    made: defaultdict[str, list[Key]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class OfRequest:
    """What is known of a request while it has blocks.

    Attributes:
        prefilled: tokens up to which it is prefilled; one less where the last of them is an answer's (after a
            preemption): a step for that token alone is a decode. More than there can be until it is scheduled.
        plan: where its prompt leaves slots, and of which kind.
        lineage: the slots that it started from and has left, in order.
        newest: the one that its answer has left last.
        withdrawn: whether a block of its states was not filled, as it was preempted.
        in_place: whether it is an answer for which there were no blocks to move to.
    """

    prefilled: int = sys.maxsize
    plan: dict[int, Kind] = field(default_factory=dict)
    lineage: list[Key] = field(default_factory=list)
    newest: Key | None = None
    withdrawn: bool = False
    in_place: bool = False


class Slots:
    """What the managers of all groups and the scheduler share."""

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.states: list[BambaStateManager] = []
        self.anchored = False  # as `state.SlotFormat` has it
        self.columns = 0  # of the worker's block table of states
        self.attention: BambaAttentionManager | None = None
        self.table = SlotTable(0)
        self.step = OfStep()
        self.requests: defaultdict[str, OfRequest] = defaultdict(OfRequest)
        self._states: dict[Key, list[KVCacheBlock]] = {}
        self._texts: dict[Key, list[KVCacheBlock]] = {}
        self._owners: dict[int, dict[Key, None]] = {}  # block id -> slots that hold it, in order
        before_allocation(pool, self.make_room)

    @property
    def groups(self) -> int:
        """How many groups of Mamba layers there are; a slot has a state block of each."""
        return len(self.states)

    @classmethod
    def of(cls, pool: Any) -> Slots:
        """The one that belongs to a block pool."""
        if not hasattr(pool, "bamba_slots"):
            pool.bamba_slots = cls(pool)
        return pool.bamba_slots

    @property
    def text(self) -> BambaAttentionManager:
        """The manager of the attention blocks."""
        assert self.attention is not None
        return self.attention

    def limit(self, share: float) -> None:
        """Let states take at most this share of the cache's blocks."""
        self.table.capacity = int(self.pool.num_gpu_blocks * share) // self.groups

    # a request's way through the scheduler

    def new_step(self) -> None:
        self.step = OfStep()

    def room_inside(self, request_id: str, end: int, copies: bool) -> bool:
        """Whether a prefill up to `end` can have a second state without taking others' blocks.

        It `copies` the state and the text's last block of another one where it starts from them.
        """
        attention = self.text
        more = -(-end // attention.block_size) - len(attention.req_to_blocks.get(request_id, ()))
        return self.pool.get_num_free_blocks() >= more + 2 * self.groups + (self.groups + 1 if copies else 0)

    def keeps_inside(self, request_id: str, position: int) -> None:
        """The step that is being scheduled leaves the state at this position, too; 0: none."""
        self.step.inner[request_id] = position

    def inner(self, request_id: str) -> int:
        """The position at which the step leaves this request's state, too; 0: none."""
        return self.step.inner.get(request_id, 0)

    def hit(self, request_id: str, key: Key) -> None:
        """The request is admitted and starts from this slot."""
        request = self.requests[request_id]
        if key in self.table and request.lineage != [key]:
            request.lineage = [key]
            self.table.hit(key)

    def admits(self, request: Request, position: int, key: Key) -> bool:
        """Whether the state at this position becomes a slot; all groups of a position get the same answer."""
        asked, decided = (request.request_id, position), self.step.decided
        if asked not in decided or (decided[asked] and key not in self._states):
            decided[asked] = self._admit(request, position, key)
        return decided[asked]

    def add_state(self, key: Key, block: KVCacheBlock) -> None:
        self._states[key].append(block)
        self._own(key, block)

    def finish(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """The request is about to give back its attention blocks: those that no slot needs lose their keys."""
        for block in blocks:
            if not block.is_null and block.ref_cnt == 1 and block.block_id not in self._owners:
                remove_keys(self.pool, block)
        self.requests.pop(request_id, None)

    def goes_on_in_place(self, request_id: str) -> bool:
        """Whether an answer's blocks take its next states, too, behind the end of their unit."""
        return self.anchored or self.requests[request_id].in_place

    def keep_in_place(self, request_id: str, tokens: int) -> bool:
        """Have an answer that has so many tokens, and for the next one no free blocks, go on in those that it has.

        It leaves no slots from then on, and the ones that these blocks are go: nobody has to be preempted for them.

        Returns:
            Whether that helps: blocks are lacking for its states, and those that it has are its own.
        """
        blocks = [states.req_to_blocks[request_id] for states in self.states]
        prefilled = self.requests[request_id].prefilled
        moves = tokens > prefilled and tokens >= len(blocks[0]) * self.states[0].block_size
        if self.goes_on_in_place(request_id) or not moves or any(of_group[-1].ref_cnt > 1 for of_group in blocks):
            return False
        for of_group in blocks:
            self._drop_owners(of_group[-1])
        self.requests[request_id].in_place = True
        return True

    def stays(self, request_id: str, tokens: int) -> bool:
        """Whether an answer in place that has so many tokens stays in its blocks with one more, attention's included.

        That one must neither begin nor fill an attention block; nor may the last of the `tokens`, which is perhaps not
        known yet, have filled one: vLLM schedules one step of a request ahead.
        """
        fits = tokens % self.text.block_size > 0 and (tokens + 1) % self.text.block_size > 0
        return fits and self.states[0].stays(request_id, tokens)

    def unit_left(self, request: Request) -> int:
        """Tokens of the last unit of an anchored answer, which others may go on from when it ends; 0: there is none."""
        known, size = self.requests[request.request_id], self.states[0].block_size
        unit = request.num_computed_tokens // size * size
        return unit if self.anchored and unit > known.prefilled and not known.withdrawn else 0

    def leave(self, request: Request, unit: int) -> None:
        """The request is about to give back all its blocks: have its state at that unit found, if its text can be."""
        if all(block.block_hash is not None for block in self.text.blocks_of(request.request_id, unit)):
            for manager in self.states:
                manager.leave(request, unit)

    def withdraw(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """Take back what a request was scheduled to compute in this step, which it will not do.

        Args:
            request_id: the request.
            blocks: attention blocks that got keys for it in this step.
        """
        self.step.inner.pop(request_id, None)
        if request_id in self.step.appended:
            self.requests[request_id].withdrawn = True
        for key in self.step.made.pop(request_id, ()):
            if key in self.table:
                self._drop(key)
        for block in blocks:
            self._drop_owners(block)
            self._forget(block)

    def clear(self) -> None:
        """vLLM has emptied its prefix cache."""
        for key in list(self._states):
            self._drop(key)

    # memory

    def make_room(self, wanted: int) -> None:
        """Give up slots until the first `wanted` free blocks hold nothing of use, or nothing can be done.

        Free blocks without a key stand before all others, and what is given up joins them: to count it is enough.
        """
        missing = wanted - self._blank(wanted)
        while missing > 0 and (victim := self.table.victim(self._idle, proven=True)) is not None:
            missing -= self._drop(victim)
        if missing > 0:
            for block in list(islice(free_blocks_in_order(self.pool), wanted)):
                self._drop_owners(block)
                self._forget(block)

    def _admit(self, request: Request, position: int, key: Key) -> bool:
        known = self.requests[request.request_id]
        kind = known.plan.get(position)
        if kind is None and position > request.num_prompt_tokens:
            kind = Kind.ANSWER
        if kind is None or self.attention is None:
            return False
        if key in self.table:  # another request has just left it there
            known.lineage.append(key)
            return False
        if kind is Kind.ANSWER:
            self._retire_answers(known)
        while self.table.full:
            victim = self.table.victim(self._idle, proven=False)
            if victim is None:
                return False
            self._drop(victim)
        text = self.attention.blocks_of(request.request_id, position)
        alone = sum(block.block_id not in self._owners for block in text)
        self.table.add(key, position, known.lineage, kind, self.groups + alone)
        known.lineage.append(key)
        self._states[key] = []
        self._texts[key] = text
        for block in text:
            self._own(key, block)
        self.step.made[request.request_id].append(key)
        if kind is Kind.ANSWER:
            known.newest = key
        return True

    def _retire_answers(self, request: OfRequest) -> None:
        """An answer has reached a new boundary: its own last slot goes, and the turn before counts as continued."""
        newest, request.newest = request.newest, None
        if newest is None:
            for key in request.lineage[:1]:
                if key in self.table and self.table[key].kind is Kind.ANSWER:
                    self.table.supersede(key)
        elif newest in self.table and not self.table[newest].uses:
            self._drop(newest)
            request.lineage.remove(newest)

    def _idle(self, key: Key) -> bool:
        return any(block.ref_cnt == 0 for block in self._states[key])

    def _blank(self, wanted: int) -> int:
        """Of the next `wanted` free blocks, those that stand before the first with a key."""
        for count, block in enumerate(islice(free_blocks_in_order(self.pool), wanted)):
            if block.block_hash is not None:
                return count
        return wanted

    def _own(self, key: Key, block: KVCacheBlock) -> None:
        self._owners.setdefault(block.block_id, {})[key] = None

    def _drop(self, key: Key) -> int:
        """Give up a slot; returns how many free blocks came to the front."""
        self.table.remove(key)
        moved = 0
        states = self._states.pop(key)
        for block in states + self._texts.pop(key):
            owners = self._owners[block.block_id]
            del owners[key]
            if not owners:
                del self._owners[block.block_id]
                if block.ref_cnt == 0 or block in states:  # a running request still needs its text's keys
                    moved += self._forget(block)
        return moved

    def _drop_owners(self, block: KVCacheBlock) -> None:
        for key in list(self._owners.get(block.block_id, ())):
            self._drop(key)

    def _forget(self, block: KVCacheBlock) -> bool:
        """Remove a block's keys; returns whether it was free and came to the front."""
        if block.block_hash is None:
            return False
        remove_keys(self.pool, block)
        if block.ref_cnt == 0:
            move_to_front(self.pool, block)
        return block.ref_cnt == 0
