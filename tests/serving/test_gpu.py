"""Parity on GPUs with vLLM's own defaults: bf16, torch.compile, CUDA graphs, chunked prefill, prefix caching."""

import pytest
import torch
from parity import Engine, Reference, assert_same, check_low_precision, random_prompts, save_random

pytestmark = pytest.mark.gpu

# head sizes that FlashAttention has kernels for; otherwise as small as on the CPU
WIDE = {"hidden_size": 128, "mamba_d_head": 64, "mamba_d_state": 32, "num_key_value_heads": 2}
DEFAULTS = {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.3}
LENGTHS = [1, 2, 4, 15, 16, 17, 100, 300]

CONFIGURATIONS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    "no_conv_bias_and_tied_embeddings": {"mamba_conv_bias": False, "tie_word_embeddings": True},
    "two_groups": {"mamba_n_groups": 2},
    "time_step_limit": {"time_step_limit": (0.05, 0.2)},
    "no_attention_layer": {"attn_layer_indices": []},
    "conv_width_2": {"mamba_d_conv": 2},
    "chunks_of_256": {"mamba_chunk_size": 256},
}


def references(path: str) -> tuple[Reference, Reference]:
    return Reference(path), Reference(path, torch.bfloat16)


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_small_configurations_equal_transformers(changes, tmp_path):
    path = save_random(tmp_path, **(WIDE | changes))
    with Engine(path, **DEFAULTS) as engine:
        answers = engine.answers(random_prompts(LENGTHS), 16)
    check_low_precision(answers, *references(path))


@pytest.mark.parametrize("eager", [False, True], ids=["compiled_with_cuda_graphs", "eager"])
def test_embedded_checkpoint_equals_transformers(eager, tiny):
    prompts = random_prompts([1, 3, 64, 200, 700], vocabulary=1024)
    with Engine(tiny, **DEFAULTS | {"enforce_eager": eager, "max_model_len": 1024}) as engine:
        answers = engine.answers(prompts, 64)
    check_low_precision(answers, *references(tiny))


def test_chunked_prefill_equals_transformers(tiny):
    with Engine(tiny, **DEFAULTS, max_num_batched_tokens=48, max_num_seqs=4) as engine:
        answers = engine.answers(random_prompts([1, 50, 130, 300], vocabulary=1024), 16)
    check_low_precision(answers, *references(tiny))


def test_adapter_equals_merged_model_and_leaves_other_requests_alone(tmp_path):
    from test_lora import PROJECTIONS, save_adapter
    from vllm.lora.request import LoRARequest

    path = save_random(tmp_path / "base", **WIDE)
    merged = save_adapter(path, str(tmp_path / "adapter"), PROJECTIONS)
    merged.save_pretrained(tmp_path / "merged")
    requests = [None, LoRARequest("adapter", 1, str(tmp_path / "adapter"))] * 2
    with Engine(path, **DEFAULTS, enable_lora=True, max_lora_rank=8) as engine:
        answers = engine.answers(random_prompts([1, 5, 20, 33]), 24, prompt_logprobs=False, lora_request=requests)
    check_low_precision(answers[0::2], *references(path))
    check_low_precision(answers[1::2], *references(str(tmp_path / "merged")))


@pytest.mark.gpu2
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_equal_transformers(split, tiny):
    with Engine(tiny, **DEFAULTS, **{split: 2}) as engine:
        answers = engine.answers(random_prompts([1, 50, 300], vocabulary=1024), 16)
    check_low_precision(answers, *references(tiny))


def test_repeated_run_gives_the_same_tokens(tiny):
    prompts = random_prompts([5, 80, 300], vocabulary=1024)
    with Engine(tiny, **DEFAULTS, enable_prefix_caching=False) as engine:
        first, second = engine.answers(prompts, 32), engine.answers(prompts, 32)
    assert_same(first, second, limit=0.0)
