"""Serve a model and a LoRA adapter of it side by side, in one batch.

    pip install peft
    python examples/lora.py

The adapter is random and made by the `peft` library for this run, so what it answers is no better English: it shows
that every projection of Bamba takes an adapter, `in_proj` and `out_proj` of the Mamba-2 layers among them.
"""

import argparse
import os
import pathlib
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TINY = pathlib.Path(__file__).parent / "bamba-tiny"
MAMBA = ["in_proj", "out_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
RANK = 8


def save_random_adapter(model: str, folder: str) -> None:
    """Write a PEFT adapter of `model` whose two factors are both random, as a trained one's are not zero either."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=MAMBA + ATTENTION + MLP, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model and a LoRA adapter of it side by side.")
    parser.add_argument("--model", default=str(TINY), help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--prompt", default="This module provides")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a CPU vLLM would ask for 92 % of the memory
    with tempfile.TemporaryDirectory() as folder:
        save_random_adapter(args.model, folder)
        llm = LLM(args.model, max_model_len=2048, enable_lora=True, max_lora_rank=RANK)
        base, adapted = llm.generate(
            [args.prompt, args.prompt],
            SamplingParams(temperature=0.0, max_tokens=40, logprobs=0),
            lora_request=[None, LoRARequest("random", 1, folder)],
        )
    print(f"\nprompt:  {args.prompt!r}")
    for name, answer in ("base:   ", base.outputs[0]), ("adapter:", adapted.outputs[0]):
        print(f"{name} {answer.text!r} (log-probability {answer.cumulative_logprob:.2f})")


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main()
