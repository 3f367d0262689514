"""Time to first token where prompts share a beginning, and how much of it is found: vLLM's caching against our slots.

    python benchmarks/bench_prefix.py --shape 9b
    python benchmarks/bench_prefix.py --shape 9b --variants vllm_operators vllm_operators_align fused_slots
    python benchmarks/bench_prefix.py --model examples/bamba-tiny --shared 256 1024 --own 20 --turns 4

Every variant is an engine in a process of its own on the same GPU. They take turns, one request at a time: heads that
several requests share, each with tokens of its own behind it, and chats, each turn of which repeats all before it.
"""

import argparse
import itertools
import pathlib
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rows import Results, add_arguments, dtype_name, dtype_of, progress
from shapes import SHAPES, bamba_config, random_prompts, write_model
from timing import Samples
from transformers import AutoConfig
from variants import Answer, Variant, add_engine_arguments, engine_options, running

UNTIMED = 2  # the first request of a head leaves it in the cache, the second shows where prompts part
OUTPUT = 8  # tokens generated after a shared head, to be compared
ROOM = 10  # requests of the longest kind for which the cache has room: what earlier cases left may have to go


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=pathlib.Path, help="folder of a Bamba checkpoint")
    source.add_argument("--shape", choices=[*SHAPES], default="9b", help="random weights of this shape")
    parser.add_argument("--shared", nargs="*", type=int, default=[256, 1024, 4096, 12000], help="tokens of the heads")
    parser.add_argument("--own", type=int, default=100, help="tokens behind the head")
    parser.add_argument("--repeats", type=int, default=5, help="timed requests of each head; chats, which take turns")
    parser.add_argument("--turns", type=int, default=10, help="turns of a chat; 0: no chats")
    parser.add_argument("--turn-new", type=int, default=60, help="tokens of a question")
    parser.add_argument("--turn-generated", type=int, default=250, help="tokens of an answer")
    add_engine_arguments(parser, variants=["vllm_operators_align", "vllm_operators_slots"])
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in that folder")
    if min(*args.shared, args.own, args.repeats, args.turn_new, args.turn_generated) < 1 or args.turns < 0:
        parser.error("numbers of tokens and --repeats must be positive")
    return args


def options_of(args: argparse.Namespace, name: str, model: str, config: Any) -> dict[str, Any]:
    """`vllm.LLM`'s arguments for one variant: steps and graphs as `vllm serve` has them."""
    heads = [shared + args.own + OUTPUT for shared in args.shared]
    longest = max(*heads, args.turns * (args.turn_new + args.turn_generated), 0)
    more: dict[str, Any] = {"max_num_batched_tokens": 8192, "disable_log_stats": False}
    if args.model:
        more["load_format"] = "auto"
    if not args.eager:
        more["compilation_config"] = {"max_cudagraph_capture_size": 512}
    return engine_options(args, name, model, config, max(ROOM, 2 * args.repeats), longest, **more)


@dataclass
class Measured:
    """Answers of all variants to the same requests.

    Attributes:
        answers: of each variant, in order.
    """

    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))

    def ttft(self, name: str) -> Samples:
        """Milliseconds."""
        return Samples(tuple(answer.ttft[0] for answer in self.answers[name]))

    def cached(self, name: str) -> Samples:
        """Tokens."""
        return Samples(tuple(answer.cached[0] for answer in self.answers[name]))

    def verified(self, random_weights: bool, exact: bool) -> str:
        """Whether all variants gave the same tokens; where they must (`exact`), it is RED if they did not."""
        tokens = [[answer.tokens for answer in of_variant] for of_variant in self.answers.values()]
        same = [all(answer == others[0] for answer in others) for others in zip(*tokens, strict=True)]
        if len(tokens) == 1:
            return "n/a: nothing to compare with"
        if all(same):
            return f"same tokens from all variants in {len(same)} of {len(same)} requests"
        if random_weights:
            return "n/a: random weights"
        return ("RED: " if exact else "") + f"same tokens from all variants in {sum(same)} of {len(same)} requests"


@dataclass
class Bench:
    """One run of this script."""

    args: argparse.Namespace
    results: Results
    variants: list[Variant]
    vocabulary: int

    def __post_init__(self) -> None:
        self.seeds = itertools.count(self.args.seed)
        self.order = random.Random(self.args.seed)

    def tokens(self, count: int) -> list[int]:
        """Random tokens, others each time."""
        return random_prompts([count], self.vocabulary, next(self.seeds))[0]

    def ask(self, prompts: Mapping[str, list[int]], tokens: int) -> dict[str, Answer]:
        """Each variant's answer to its prompt, the variants in a new order."""
        return {
            variant.name: variant.generate([prompts[variant.name]], tokens)
            for variant in self.order.sample(self.variants, len(self.variants))
        }

    def shared(self, head: int, repeats: int) -> Measured:
        """Requests that share `head` tokens, those after the first `UNTIMED`."""
        begin, measured = self.tokens(head), Measured()
        for number in range(UNTIMED + repeats):
            prompt = begin + self.tokens(self.args.own)
            answers = self.ask({variant.name: prompt for variant in self.variants}, OUTPUT)
            if number >= UNTIMED:
                for name, answer in answers.items():
                    measured.answers[name].append(answer)
        return measured

    def chats(self, chats: int, turns: int) -> Iterator[Measured]:
        """Each turn of that many chats, which go on together; each variant goes on from its own answers."""
        texts = [{variant.name: list[int]() for variant in self.variants} for _ in range(chats)]
        for _ in range(turns):
            measured = Measured()
            for chat in texts:
                question = self.tokens(self.args.turn_new)
                for name in chat:
                    chat[name] += question
                for name, answer in self.ask(chat, self.args.turn_generated).items():
                    measured.answers[name].append(answer)
                    chat[name] += answer.tokens[0]
            yield measured

    def report(self, case: str, measured: Measured, **columns: Any) -> None:
        """Write and print one case."""
        args = self.args
        exact = dtype_of(args.dtype) == dtype_of("float32")
        columns |= {"case": case, "concurrency": 1, "verified": measured.verified(args.model is None, exact)}
        print(f"{case}, {columns['prompt_tokens']} tokens", end="")
        for variant in self.variants:
            ttft, cached = measured.ttft(variant.name), measured.cached(variant.name)
            self.results.add_samples(ttft, metric="ttft", unit="ms", **variant.columns | columns)
            self.results.add_samples(cached, metric="cached_tokens", unit="tokens", **variant.columns | columns)
            print(f"  {variant.name} {ttft.median:.1f} ms ({ttft.low:.1f} to {ttft.high:.1f})", end="")
            print(f", {cached.median:g} cached", end="")
        print(f"  ({columns['verified']})", flush=True)

    def run(self) -> None:
        args = self.args
        for head in args.shared:
            progress(f"{head} shared tokens and {args.own} of its own, {args.repeats} times")
            self.shared(head, repeats=1)  # may compile what the start did not
            measured, length = self.shared(head, args.repeats), head + args.own
            self.report("shared prefix", measured, shared_prefix=head, prompt_tokens=length, output_tokens=OUTPUT)
        progress(f"{args.repeats} chats of {args.turns} turns")
        for number, measured in enumerate(self.chats(args.repeats, args.turns)):
            before = number * (args.turn_new + args.turn_generated)
            self.report(
                f"chat turn {number + 1}",
                measured,
                shared_prefix=before,
                prompt_tokens=before + args.turn_new,
                output_tokens=args.turn_generated,
            )


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    name = args.model.name if args.model else f"bamba-{args.shape}"
    results = Results.of(
        "bench_prefix",
        args,
        list(argv),
        model=name,
        weights="checkpoint" if args.model else "random",
        dtype=dtype_name(dtype_of(args.dtype)),
    )
    config = AutoConfig.from_pretrained(args.model) if args.model else bamba_config(args.shape)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_model(pathlib.Path(folder), "bamba", args.shape)
        options = {name: options_of(args, name, str(model), config) for name in args.variants}
        with running(options) as variants:
            Bench(args, results, variants, config.vocab_size).run()
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
