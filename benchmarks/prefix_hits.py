"""Tokens that requests find in the prefix cache: vLLM alone, and with prefix-aware slots.

    python -m benchmarks.prefix_hits

vLLM's real scheduler and cache managers run at Bamba-9B's geometry, without a model: the table holds on any machine.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import vllm_bamba
from benchmarks.simulator import Geometry, Simulator
from vllm_bamba.prefix.policy import UNIT

Make = Callable[..., Simulator]


def text(seed: int, tokens: int) -> list[int]:
    """Tokens that no other seed repeats."""
    generator = random.Random(seed)
    return [generator.randrange(3, 500) for _ in range(tokens)]


def resend(make: Make, tokens: int) -> list[int]:
    """The same prompt again."""
    engine, prompt = make(), text(tokens, tokens)
    engine.ask(prompt)
    return _right(engine, [engine.ask(prompt).hit])


def shared_head(make: Make, head: int = 256, own: int = 100, known: bool = False) -> list[int]:
    """Requests 2 and 3 of those that share a head."""
    engine, start = make(), text(1, head)
    asked = [engine.ask(start + text(10 + i, own), shared=head if known else 0) for i in range(3)]
    return _right(engine, [seen.hit for seen in asked[1:]])


def burst(make: Make, head: int = 1500, own: int = 700, requests: int = 8) -> list[int]:
    """Requests that share a head and come at once: hits of those after the first two.

    The second starts while the first is computed, and is the one from which vLLM learns where they part.
    """
    engine, start = make(), text(2, head)
    names = [engine.add(start + text(30 + i, own)) for i in range(requests)]
    engine.finish()
    return _right(engine, [engine.seen[name].hit for name in names[2:]])


def chat(make: Make, turns: int = 10, new: int = 60, answer: int = 250) -> tuple[list[int], list[int]]:
    """Hits of the turns after the first, and what the turns before had computed."""
    engine, conversation, hits, ends = make(), [], [], []
    for turn in range(turns):
        conversation += text(100 + turn, new)
        seen = engine.ask(conversation, answer)
        hits.append(seen.hit)
        conversation += seen.answer
        ends.append(len(conversation) - 1)  # the last token of an answer is never computed
    return _right(engine, hits[1:]), ends[:-1]


def edited(make: Make, tokens: int = 10_000, at: float = 0.8) -> list[int]:
    """A document again, with other tokens from some point on."""
    engine, document = make(), text(3, tokens)
    engine.ask(document)
    cut = int(tokens * at)
    return _right(engine, [engine.ask(document[:cut] + text(4, tokens - cut)).hit])


@dataclass(frozen=True)
class Tree:
    """One system prompt, tools below it, users below each; every user asks a number of times, all shuffled."""

    system: int = 512
    tool: int = 512
    user: int = 256
    tools: int = 4
    users: int = 8
    times: int = 6

    def requests(self, seed: int = 5) -> list[tuple[int, int]]:
        """Tool and user of each request, in order."""
        asked = list(itertools.product(range(self.tools), range(self.users))) * self.times
        random.Random(seed).shuffle(asked)
        return asked

    def prompt(self, tool: int, user: int) -> list[int]:
        return text(1000, self.system) + text(1100 + tool, self.tool) + text(1200 + 100 * tool + user, self.user)

    @property
    def states(self) -> int:
        return 1 + self.tools + self.tools * self.users


def tree(make: Make, shape: Tree = Tree(), part: float = 0.2) -> tuple[int, int]:
    """Tokens hit in all, and by an oracle that knows the future, with memory for a part of the states."""
    kept = int(shape.states * part)
    texts = 2 + shape.tools + shape.tools * shape.users
    geometry = Geometry(blocks=kept * Geometry.mamba_groups + texts + 3 * Geometry.mamba_groups)
    share = (kept + 0.5) * geometry.mamba_groups / geometry.blocks  # as many slots as the oracle has
    engine = make(geometry=geometry, share=share)
    hits = [engine.ask(shape.prompt(*request)).hit for request in shape.requests()]
    return sum(_right(engine, hits)), oracle(shape, kept)


def oracle(shape: Tree, kept: int) -> int:
    """Tokens that `kept` slots could hit if the future were known: each request keeps what will save most, soonest.

    Nodes of the tree become slots when a request passes; of all that exist the one goes whose next use saves the
    fewest tokens for each request that it must be kept.
    """
    asked = shape.requests()
    ends = (shape.system, shape.system + shape.tool, shape.system + shape.tool + shape.user)
    paths = [((), (tool,), (tool, user)) for tool, user in asked]
    slots: set[tuple[int, ...]] = set()
    total = 0

    def worth(node: tuple[int, ...], now: int) -> float:
        uses = [later for later in range(now + 1, len(paths)) if node in paths[later]]
        if not uses:
            return 0.0
        above = [len(other) for other in slots if len(other) < len(node) and node[: len(other)] == other]
        saved = _floor(ends[len(node)]) - (_floor(ends[max(above)]) if above else 0)
        return saved / (uses[0] - now)

    for now, path in enumerate(paths):
        total += max((_floor(ends[len(node)] - (len(node) == 2)) for node in path if node in slots), default=0)
        slots.update(path)
        while len(slots) > kept:
            slots.remove(min(slots, key=lambda node: worth(node, now)))
    return total


def _floor(tokens: int) -> int:
    return tokens // UNIT * UNIT


def _right(engine: Simulator, hits: list[int]) -> list[int]:
    if engine.wrong:
        raise AssertionError(engine.wrong[0])
    return hits


def vllm_alone(**options: object) -> Simulator:
    return Simulator(slots=False, **options)  # type: ignore[arg-type]


def rows(make: Make) -> list[str]:
    """One cell for each scenario."""
    hits, ends = chat(make)
    saved, possible = tree(make)
    return [
        ", ".join(str(resend(make, tokens)[0]) for tokens in (300, 500, 1300)),
        _list(shared_head(make)),
        _list(shared_head(make, known=True)),
        _list(burst(make)),
        f"{100 * sum(hits) // sum(ends)} % ({_list(hits)})",
        f"{100 * saved // possible} % of the oracle's",
        f"{edited(make)[0] / 100:.0f} %",
    ]


def _list(hits: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(hits)) if len(set(hits)) == 1 else hits))


SCENARIOS = (
    "resend of 300, 500, 1300 tokens",
    "256 shared + 100 own, requests 2, 3",
    "the same, the shared part's length given",
    "1500 shared + 700 own, 8 at once, requests 3 to 8",
    "chat of 10 turns, 60 new + 250 generated",
    "tree of 1 system prompt, 4 tools, 8 users each, 20 % of the states",
    "document of 10,000 tokens edited at 80 %",
)


def main() -> None:
    vllm_bamba.register()
    print("| tokens hit | vLLM alone | prefix-aware slots |\n|---|---|---|")
    for scenario, *cells in zip(SCENARIOS, rows(vllm_alone), rows(Simulator), strict=True):
        print(f"| {scenario} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
