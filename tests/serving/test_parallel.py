"""Tensor and pipeline parallelism on two CPU cores give what one process gives."""

import pytest
from parity import Engine, Reference, assert_same, random_prompts, save_random

pytestmark = pytest.mark.multiprocess

PROMPTS = random_prompts([1, 4, 17, 40])
TWO_WORKERS = {"distributed_executor_backend": "mp"}


@pytest.fixture(autouse=True)
def one_core_a_worker(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
        {"mamba_n_groups": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ],
    ids=["one_group_copied_to_both_ranks_with_biases", "two_groups_dealt_out_and_tied_embeddings"],
)
def test_tensor_parallel_equals_transformers(changes, tmp_path):
    path = save_random(tmp_path, **changes)
    with Engine(path, tensor_parallel_size=2, **TWO_WORKERS) as engine:
        answers = engine.answers(PROMPTS)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


@pytest.mark.parametrize(
    "changes",
    [{"attn_layer_indices": [1]}, {"attn_layer_indices": [1, 3], "tie_word_embeddings": True}],
    ids=["second_stage_without_attention", "attention_in_both_stages_and_tied_embeddings"],
)
def test_pipeline_parallel_equals_transformers(changes, tmp_path):
    path = save_random(tmp_path, **changes)
    # compiled: vLLM's CPU worker makes a later stage's input buffers in the run that compiles, eager ones fail
    with Engine(path, pipeline_parallel_size=2, enforce_eager=False, **TWO_WORKERS) as engine:
        answers = engine.answers(PROMPTS)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)
    with Engine(path) as engine:
        assert_same(answers, engine.answers(PROMPTS))
