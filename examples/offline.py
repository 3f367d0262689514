"""Complete a batch of prompts without a server.

    python examples/offline.py
    python examples/offline.py --model ibm-ai-platform/Bamba-9B-v2

vLLM batches the prompts itself, however many there are, and answers in their order.
"""

import argparse
import os
import pathlib
import time

from vllm import LLM, SamplingParams

TINY = pathlib.Path(__file__).parent / "bamba-tiny"
PROMPTS = [
    "Return the number of",
    "This module provides",
    "A dictionary is",
    "The following exceptions are",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a batch of prompts without a server.")
    parser.add_argument("--model", default=str(TINY), help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a CPU vLLM would ask for 92 % of the memory
    llm = LLM(args.model, max_model_len=2048)
    start = time.perf_counter()
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=args.max_tokens))
    seconds = time.perf_counter() - start

    for output in outputs:
        print(f"\n{output.prompt!r} ->\n{output.outputs[0].text}")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s, first-use costs included")


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main()
