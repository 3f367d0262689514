"""Random requests that share, branch, repeat and stop: what an engine with a prefix cache has to stand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from parity import Answer, Engine, _answer, greedy, random_prompts
from vllm import SamplingParams


def parameters(tokens: int, shared: int, of_prompt: bool = False) -> SamplingParams:
    """A greedy request of which the first `shared` tokens, if any, are said to be shared."""
    given = greedy(tokens, of_prompt)
    given.extra_args = {"bamba_shared_tokens": shared} if shared else None
    return given


@dataclass
class Traffic:
    """What became of random requests, but for those that were aborted."""

    answers: list[Answer] = field(default_factory=list)
    hits: int = 0  # requests that found something in the cache
    of_prompts: int = 0  # requests that asked for their prompt's logprobs
    preempted: int = 0
    in_place: set[str] = field(default_factory=set)  # requests whose answers had no blocks to move to


def traffic(engine: Engine, seed: int, requests: int) -> Traffic:
    """Random requests, added while others run: shared heads, branches, the same again, chats, aborts."""
    rng = random.Random(seed)
    inner, seen = engine.llm.llm_engine, Traffic()
    preempt = engine.scheduler._preempt_request
    heads = random_prompts([40, 90, 170], seed=seed)
    past: list[list[int]] = []
    aborted: set[str] = set()

    def counted(*args: object, **kwargs: object) -> None:
        seen.preempted += 1
        preempt(*args, **kwargs)

    def step() -> None:
        outputs = inner.step()
        if hasattr(engine.scheduler, "slots"):
            known = engine.scheduler.slots.requests
            seen.in_place |= {name for name in known if known[name].in_place}
        for output in outputs:
            if output.finished and output.request_id not in aborted and output.outputs[0].finish_reason == "length":
                answer = _answer(output)
                seen.answers.append(answer)
                past.append((answer.prompt + answer.generated)[:300])
                seen.hits += output.num_cached_tokens > 0
                seen.of_prompts += output.prompt_logprobs is not None

    engine.scheduler._preempt_request = counted
    for index in range(requests):
        own = random_prompts([rng.randrange(1, 60)], seed=1000 * seed + index)[0]
        kind = rng.randrange(4) if past else 1
        prompt = own if kind == 0 else rng.choice(heads) + own
        if kind > 1:
            earlier = rng.choice(past)
            prompt = earlier if kind == 2 else earlier[: rng.randrange(1, len(earlier) + 1)] + own
        limits = parameters(rng.randrange(1, 100), rng.choice([0, 0, 40]), of_prompt=rng.random() < 0.2)
        inner.add_request(f"{index}", {"prompt_token_ids": prompt}, limits)
        if index % 3 == 0:
            past.append(prompt)
        for _ in range(rng.choice([0, 0, 2, 12])):
            step()
        if rng.random() < 0.07:
            aborted.add(f"{index}")
            inner.abort_request([f"{index}"])
    while inner.has_unfinished_requests():
        step()
    return seen
