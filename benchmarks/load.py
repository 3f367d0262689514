"""What `bench_serving.py serve` asks a server: data sets of `vllm bench serve` under several loads."""

import argparse
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shapes import write_conversations


@dataclass(frozen=True)
class Requests:
    """One `vllm bench serve` run: its data set, its load, and the columns that describe them."""

    flags: tuple[str, ...]
    columns: dict[str, Any]


def longest(args: argparse.Namespace) -> int:
    """Tokens that the longest request needs."""
    lengths = [args.input]
    if "serve" in args.what and "prefix" in args.datasets:
        lengths.append(max(args.prefixes) + args.input)
    if "serve" in args.what and "multi_turn" in args.datasets:
        lengths.append(args.input + args.turns * args.growth)
    return max(lengths) + args.output + 16  # tokenizers may add a few


def requests(args: argparse.Namespace, tokenizer: pathlib.Path, work: pathlib.Path) -> Iterator[Requests]:
    """Every data set under every load; each with random tokens of its own, so that none finds another's prefix."""
    loads = [(str(rate), None) for rate in args.rates] + [("inf", c) for c in args.concurrencies]
    for dataset in args.datasets:
        if dataset == "multi_turn":
            yield _multi_turn(args, tokenizer, work)
            continue
        for prefix in args.prefixes if dataset == "prefix" else [0]:
            for rate, concurrency in loads:
                flags = ["--num-prompts", str(args.num_prompts), "--request-rate", rate]
                flags += ["--max-concurrency", str(concurrency)] if concurrency else []
                if dataset == "random":
                    flags += ["--dataset-name", "random", "--random-input-len", str(args.input)]
                    flags += ["--random-output-len", str(args.output)]
                else:
                    flags += ["--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", str(prefix)]
                    flags += ["--prefix-repetition-suffix-len", str(args.input)]
                    flags += ["--prefix-repetition-num-prefixes", str(args.num_prefixes)]
                    flags += ["--prefix-repetition-output-len", str(args.output)]
                columns = {"case": dataset, "prompt_tokens": prefix + args.input, "rate": rate}
                columns |= {"concurrency": concurrency or "unlimited", "shared_prefix": prefix}
                yield Requests(tuple(flags), columns)


def _multi_turn(args: argparse.Namespace, tokenizer: pathlib.Path, work: pathlib.Path) -> Requests:
    file = work / "conversations.jsonl"
    count = write_conversations(file, tokenizer, args.conversations, args.turns, args.input, args.growth, args.seed)
    concurrency = max(1, args.conversations // 2)  # a turn starts when the one before it is long answered
    flags = ["--dataset-name", "custom", "--dataset-path", str(file), "--disable-shuffle", "--skip-chat-template"]
    flags += ["--custom-output-len", str(args.output), "--num-prompts", str(count)]
    flags += ["--max-concurrency", str(concurrency)]
    lengths = f"{args.input} to {args.input + (args.turns - 1) * args.growth}"
    columns = {"case": "multi_turn", "prompt_tokens": lengths, "rate": "inf", "concurrency": concurrency}
    return Requests(tuple(flags), columns)
