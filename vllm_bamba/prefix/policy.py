"""Which token positions get a slot and which slot goes when memory is short: plain integers, no vLLM.

The rule, in full:

- A prefill leaves a slot at the end of its prompt, at the end of the part that it shares with others (known because
  an earlier prompt parts there, because the request says so, or because a chat's system messages end there), and,
  where it has at least `SPREAD_FROM` tokens to compute and half of the slots are free, at `SPREAD` of its length.
- The state at a prompt's end is kept in passing (`inner_position`), if there is memory for two states in one step; at
  other positions a prefill stops, which costs a step. So a position where prompts part gets a slot only if that saves
  `LEAST_GAIN` tokens.
- A running answer keeps one slot, at its newest boundary; an anchored one (`state.SlotFormat`) when it ends.
- A slot counts as of use once a request has started from it; where two prompts part, or the request says that others
  share its text, from the beginning. The end of a system message must prove itself: each chat may have its own.
- A slot that was never of use goes before any that was; among equals the one of least value goes, which is
  `tokens saved x (1 + uses) / (age x blocks)`. Tokens saved are those since the next slot up the same text; age counts
  the slots that were added or hit since this one last was. So prompts that come once push out each other, never the
  system prompt that many share.
- Slots that were of use are at most `PROVEN` of all; beyond that the least valuable counts as unused again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

Key = Hashable

UNIT = 16  # tokens: slots lie at multiples of it, hits too
PREFILLS = 64  # sequences that a step prefills at most: states of each are in memory several times while it does
LEAST_GAIN = 128  # tokens: about 4 ms of prefill on an H200, one step
SPREAD_FROM = 2048  # tokens
SPREAD = ((1, 2), (3, 4), (7, 8))
PROVEN = (3, 4)
_SCALE = 1 << 20  # keeps the values' fractions in integers
_MOST = (1 << 63) - 1  # a value above all others


class Kind(Enum):
    """Why a position has a slot."""

    PROMPT = "end of a prompt"
    SHARED = "end of what several requests share"
    SYSTEM = "end of a chat's system messages"
    SPREAD = "on the way of a long prompt"
    ANSWER = "newest boundary of an answer"


def plan_prefill(
    tokens: int, hit: int, junction: int = 0, hint: int = 0, system: int = 0, unit: int = UNIT, roomy: bool = True
) -> dict[int, Kind]:
    """Positions, in tokens, at which a prefill leaves a slot.

    Args:
        tokens: length of the prompt (of a resumed request: of all that it has).
        hit: tokens that the cache gives it; computing starts there.
        junction: where an earlier prompt parts from this one, 0 where none is known beyond `hit`.
        hint: length of the shared part as the request gives it, 0 without.
        system: length of a chat's system messages, 0 where there are none.
        unit: tokens between possible positions.
        roomy: whether there is memory for the positions on the way.
    """
    last = (tokens - 1) // unit * unit  # the last token is computed again, for its logits
    plan: dict[int, Kind] = {}
    if roomy and tokens - hit >= SPREAD_FROM:
        for numerator, denominator in SPREAD:
            position = -(-tokens * numerator // (denominator * unit)) * unit
            if position - hit >= LEAST_GAIN:
                plan[position] = Kind.SPREAD
    plan[last] = Kind.PROMPT
    plan[min(system // unit * unit, last)] = Kind.SYSTEM
    if junction - hit >= LEAST_GAIN:
        plan[junction // unit * unit] = Kind.SHARED
    if hint:
        plan[min(hint // unit * unit, last)] = Kind.SHARED
    return {position: plan[position] for position in sorted(plan) if hit < position <= last}


def inner_position(start: int, end: int, unit: int = UNIT) -> int:
    """Where the state inside of a prefill chunk of tokens `start` to `end` is kept, too: its last unit; 0: nowhere."""
    position = (end - 1) // unit * unit
    return position if position - start >= unit else 0


def chunk_tokens(start: int, tokens: int, stops: Iterable[int], kept: int = 0) -> int:
    """Tokens of a prefill chunk that starts at `start` and may have `tokens`: up to the first stop inside it.

    At the position `kept` it need not stop.
    """
    first = min((stop for stop in stops if start < stop < start + tokens), default=kept)
    return tokens if first == kept else first - start


@dataclass
class Slot:
    """A state in the cache.

    Attributes:
        position: tokens before it.
        parent: the next slot up the same text, None where there is none.
        blocks: memory that goes with it.
        row: of the table's columns.
        last: the clock when it was last added or hit.
        uses: requests that started from it, plus one where it is known to be shared.
    """

    position: int
    parent: Key | None
    kind: Kind
    blocks: int
    row: int
    last: int
    uses: int = 0
    children: set[Key] = field(default_factory=set)


class SlotTable:
    """The slots in the cache, and which of them to give up.

    An engine has thousands of slots and looks for the one to give up while its scheduler runs. What the rule compares
    therefore lies in columns of integers, one row for each slot, which numpy goes through in some microseconds.

    Args:
        capacity: the most slots that may exist.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._slots: dict[Key, Slot] = {}
        self._rows: list[Key] = []
        self._columns: np.ndarray = np.zeros((3, 64), np.int64)  # value at age 1, clock when last added or hit, uses
        self._clock = 0
        self._proven = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, key: Key) -> Slot:
        return self._slots[key]

    @property
    def full(self) -> bool:
        return len(self._slots) >= self.capacity

    @property
    def roomy(self) -> bool:
        return 2 * len(self._slots) < self.capacity

    def add(self, key: Key, position: int, lineage: Iterable[Key], kind: Kind, blocks: int) -> None:
        """Enter a slot.

        Args:
            key: names the text before it.
            position: tokens of that text.
            lineage: keys of slots up the same text, those that are gone included.
            kind: why it is there.
            blocks: memory that goes with it.
        """
        above = [k for k in lineage if k in self._slots and self._slots[k].position < position]
        parent = max(above, key=lambda k: self._slots[k].position, default=None)
        self._clock += 1
        self._slots[key] = Slot(position, parent, kind, blocks, len(self._rows), self._clock)
        self._rows.append(key)
        if parent is not None:
            self._slots[parent].children.add(key)
        self._write(key)
        if kind is Kind.SHARED:
            self._prove(key)

    def hit(self, key: Key) -> None:
        """A request starts from this slot."""
        self._clock += 1
        self._slots[key].last = self._clock
        self._prove(key)

    def supersede(self, key: Key) -> None:
        """The one request that started from this slot has left a later one: it counts as unused again."""
        if key in self._slots and self._slots[key].uses == 1:
            self._forget_uses(key)

    def remove(self, key: Key) -> None:
        slot = self._slots.pop(key)
        self._proven -= slot.uses > 0
        if slot.parent is not None:
            self._slots[slot.parent].children.discard(key)
        for child in slot.children:
            self._slots[child].parent = slot.parent
            if slot.parent is not None:
                self._slots[slot.parent].children.add(child)
            self._write(child)
        moved = self._rows.pop()  # the last row takes the place of the one that goes
        if moved != key:
            self._rows[slot.row] = moved
            self._slots[moved].row = slot.row
            self._write(moved)

    def victim(self, idle: Callable[[Key], bool], proven: bool) -> Key | None:
        """The slot to give up first, None where there is none.

        Args:
            idle: whether giving up this slot would free memory now.
            proven: whether one that was of use may go too, if there is no other.
        """
        unused = self._least_value(False, idle)
        return self._least_value(True, idle) if unused is None and proven else unused

    def _least_value(self, of_use: bool, idle: Callable[[Key], bool] = lambda key: True) -> Key | None:
        """Of the slots that were of use, or of those that were not, the one of least value."""
        value, last, uses = self._columns[:, : len(self._rows)]
        values = np.where((uses > 0) == of_use, value // (1 + self._clock - last), _MOST)
        while len(values):
            row = int(values.argmin())
            if values[row] == _MOST:
                return None
            if idle(self._rows[row]):
                return self._rows[row]
            values[row] = _MOST
        return None

    def _write(self, key: Key) -> None:
        """Bring a slot's row up to date."""
        slot = self._slots[key]
        if slot.row == self._columns.shape[1]:
            self._columns = np.hstack([self._columns, np.zeros_like(self._columns)])
        saved = slot.position - (self._slots[slot.parent].position if slot.parent is not None else 0)
        value = min(saved * (1 + slot.uses) * _SCALE // slot.blocks, _MOST - 1)
        self._columns[:, slot.row] = value, slot.last, slot.uses

    def _prove(self, key: Key) -> None:
        slot = self._slots[key]
        slot.uses += 1
        self._write(key)
        if slot.uses > 1:
            return
        self._proven += 1
        numerator, denominator = PROVEN
        if self._proven * denominator > self.capacity * numerator:
            self._forget_uses(self._least_value(True))

    def _forget_uses(self, key: Key) -> None:
        self._slots[key].uses = 0
        self._proven -= 1
        self._write(key)
