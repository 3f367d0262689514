"""Complete every row of a data set with Ray Data, on one machine or on a Ray cluster.

    pip install 'ray[data]'
    python examples/ray_data.py --out answers
    python examples/ray_data.py --data prompts.jsonl --model ibm-ai-platform/Bamba-9B-v2 --engines 4

`--data` names JSON lines with a column "prompt"; without it the data set is a sentence about each module of Python's
standard library. Ray reads, batches, runs `--engines` vLLM engines and writes, all at once and in pieces, so the data
need not fit in memory. On a cluster, start this on one of its nodes with RAY_ADDRESS=auto; every node needs this
package and the model (a hub name, or a folder that all nodes see).
"""

import argparse
import pathlib
import sys

import ray
import torch
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

TINY = pathlib.Path(__file__).parent / "bamba-tiny"


def read(path: str | None) -> ray.data.Dataset:
    if path:
        return ray.data.read_json(path)
    modules = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    return ray.data.from_items([{"prompt": f"The module {name} provides"} for name in modules], override_num_blocks=4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete every row of a data set with Ray Data.")
    parser.add_argument("--model", default=str(TINY.resolve()), help="folder or hub name (default: the embedded one)")
    parser.add_argument("--data", help="JSON lines with a column 'prompt'")
    parser.add_argument("--out", help="folder for the answers, as JSON lines (default: print some)")
    parser.add_argument("--engines", type=int, default=1, help="engines at work, each on a GPU of its own")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    # Ray asks for one GPU an engine unless it is told what an engine's worker takes
    worker = {"GPU": 1} if torch.cuda.is_available() else {"CPU": 1}
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={"max_model_len": 2048},
        placement_group_config={"bundle_per_worker": worker},
        # GiB of cache on a CPU, where vLLM would ask for 92 % of the memory
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        concurrency=args.engines,
        batch_size=32,
        # rows carry plain prompts, and vLLM turns text into tokens and back itself
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,  # vLLM reports them through Ray Serve, which 'ray[data]' does not install
    )
    complete = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": row["prompt"],
            "sampling_params": {"temperature": 0.0, "max_tokens": args.max_tokens},
        },
        postprocess=lambda row: {"prompt": row["prompt"], "answer": row["generated_text"]},
    )
    answers = complete(read(args.data))
    if args.out:
        answers.write_json(args.out)
        print(f"answers are in {args.out}")
    else:
        for row in answers.take(8):
            print(f"{row['prompt']!r} -> {row['answer']!r}")


if __name__ == "__main__":  # workers import this file again
    main()
