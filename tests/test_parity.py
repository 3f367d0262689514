"""The engine against Transformers in fp32, with the same weights: greedy tokens equal, every logprob within 1e-4."""

import math

import pytest
import torch
from parity import LIMIT, Answer, Engine, Reference, assert_same, check_low_precision, random_prompts, save_random
from safetensors.torch import load_file
from vllm.config import CompilationMode
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vllm_bamba.state_metadata import StateMetadataBuilder

# lengths about the chunk (16) and the convolution's width (4), one token, and several blocks
LENGTHS = [1, 2, 3, 4, 15, 16, 17, 33, 100]

CONFIGURATIONS = {
    "plain": {},
    "attention_and_mlp_biases": {"attention_bias": True, "mlp_bias": True},
    "projection_bias_without_conv_bias": {"mamba_proj_bias": True, "mamba_conv_bias": False},
    "tied_embeddings": {"tie_word_embeddings": True},
    "two_groups": {"mamba_n_groups": 2},
    "four_groups_and_auto_head_dim": {"mamba_n_groups": 4, "mamba_d_head": "auto"},
    "time_step_limit": {"time_step_limit": (0.05, 0.2)},
    "quarter_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "linear_rope_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "yarn_rope_scaling": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "llama3_rope_scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "no_attention_layer": {"attn_layer_indices": []},
    "no_mamba_layer": {"attn_layer_indices": [0, 1, 2, 3]},
    "attention_layers_only_at_the_ends": {"attn_layer_indices": [0, 3]},
    "conv_width_2": {"mamba_d_conv": 2},
    "conv_width_3": {"mamba_d_conv": 3},
    "every_head_its_own_keys": {"num_key_value_heads": 2, "num_attention_heads": 2},
}


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_small_configurations_equal_transformers(changes, tmp_path):
    path = save_random(tmp_path, **changes)
    with Engine(path) as engine:
        answers = engine.answers(random_prompts(LENGTHS), max_tokens=10)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


def test_absent_rotary_dimension_means_half_and_a_given_one_is_honoured(tmp_path):
    half = save_random(tmp_path / "half")
    quarter = save_random(
        tmp_path / "quarter", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    )
    prompts = random_prompts([40])
    answers = {}
    for name, path, options in (
        ("absent", half, {}),
        ("half", half, {"hf_overrides": {"attn_rotary_emb": 16}}),
        ("quarter", half, {"hf_overrides": {"attn_rotary_emb": 8}}),
    ):
        with Engine(path, **options) as engine:
            answers[name] = engine.answers(prompts)
    Reference(half).check(answers["absent"][0])
    assert_same(answers["absent"], answers["half"])
    Reference(quarter).check(answers["quarter"][0])  # same seed, so the same weights


def test_embedded_checkpoint_equals_transformers(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [
        "Return a new list containing",
        "The for statement is used to iterate over the elements of a sequence",
        "Raise ValueError if",
        "This module provides a class",
        "A function definition defines a user-defined function object. " * 20,
    ]
    with Engine(tiny, max_model_len=1024) as engine:
        answers = engine.answers([tokenizer(text)["input_ids"] for text in texts], max_tokens=64)
    reference = Reference(tiny)
    for answer in answers:
        reference.check(answer)
        text = answer.prompt + answer.generated
        best, second = reference.logprobs(text)[len(answer.prompt) - 1 : -1].topk(2).values.unbind(-1)
        assert (best - second).min() > 2 * LIMIT, "two engines within the limit could choose differently"


def test_batches_of_mixed_lengths_equal_one_request_at_a_time(tmp_path):
    path = save_random(tmp_path)
    prompts, lengths = random_prompts([7, 1, 64, 130, 3, 16, 31, 200, 17, 2]), [5, 30, 1, 12, 25, 8, 2, 9, 3, 17]
    with Engine(path, max_num_seqs=4, enable_prefix_caching=False) as engine:
        together = engine.answers(prompts, lengths)
        alone = [engine.answers([p], n)[0] for p, n in zip(prompts, lengths, strict=True)]
    assert_same(together, alone)


@pytest.mark.parametrize("caching", [False, True], ids=["no caching", "slots"])
def test_prompts_of_one_token_begin_from_nothing(caching, tmp_path, monkeypatch):
    """All at once they are decodes to Model Runner V1, in slots that others have used."""
    build, seen = StateMetadataBuilder.build, []

    def remember(*given, **more):
        seen.append(build(*given, **more))
        return seen[-1]

    monkeypatch.setattr(StateMetadataBuilder, "build", remember)
    path = save_random(tmp_path, num_hidden_layers=6, attn_layer_indices=[2])  # two groups of Mamba layers and more
    with Engine(path, max_num_seqs=4, enable_prefix_caching=caching, num_gpu_blocks_override=40) as engine:
        engine.answers(random_prompts([60] * 6), 5)
        answers = engine.answers(random_prompts([1] * 7), 40)
    first = [metadata for metadata in seen if len(metadata.first_rows)]
    assert sum(len(metadata.first_rows) for metadata in first) >= 4
    assert all(metadata.num_prefills == 0 for metadata in first)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


@pytest.mark.parametrize("budget", [5, 16, 19, 64])
def test_chunked_prefill_at_awkward_sizes_equals_whole(budget, tmp_path):
    path = save_random(tmp_path, shard_size="100KB")  # and from a checkpoint in shards
    prompts = random_prompts([1, 18, 37, 64, 101])
    with Engine(path, max_num_batched_tokens=budget, max_num_seqs=4, enable_prefix_caching=False) as engine:
        chunked = engine.answers(prompts, prompt_logprobs=False)
        with_logprobs = engine.answers(prompts)
    reference = Reference(path)
    for answer in with_logprobs:
        reference.check(answer)
    assert_same(chunked, with_logprobs)


def test_compiled_model_equals_transformers(tmp_path):
    path = save_random(tmp_path)
    with Engine(path, enforce_eager=False) as engine:
        assert engine.llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        answers = engine.answers(random_prompts(LENGTHS))
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


def test_preempted_and_resumed_requests_equal_undisturbed_ones(tmp_path, monkeypatch):
    path = save_random(tmp_path)
    with Engine(path, enable_prefix_caching=False) as engine:
        block = engine.llm.llm_engine.vllm_config.cache_config.block_size
        prompts = random_prompts([block // 2 + i for i in range(4)])
        undisturbed = engine.answers(prompts, block, prompt_logprobs=False)
    # a request takes one block of attention and one of state, later two of attention: 8 blocks at first, 12 at last
    with Engine(path, num_gpu_blocks_override=11, enable_prefix_caching=False) as engine:
        preempt, times = engine.scheduler._preempt_request, []
        monkeypatch.setattr(engine.scheduler, "_preempt_request", lambda *a, **k: (times.append(a), preempt(*a, **k)))
        preempted = engine.answers(prompts, block, prompt_logprobs=False)
    assert times, "the cache was large enough for all: nothing was tested"
    assert_same(undisturbed, preempted)


def test_bfloat16_stays_as_close_to_fp32_as_transformers_in_bfloat16(tiny):
    prompts = random_prompts([5, 40, 150], vocabulary=1024, seed=3)
    with Engine(tiny, dtype="bfloat16") as engine:
        answers = engine.answers(prompts)
    check_low_precision(answers, Reference(tiny), Reference(tiny, torch.bfloat16))


def test_low_precision_is_told_from_the_state_of_another_text(tiny):
    exact, plain = Reference(tiny), Reference(tiny, torch.bfloat16)

    def answer(prompt, generated, seen):
        """What bf16 says of `generated` behind `seen`."""
        logprobs = plain.logprobs(seen + generated)[len(seen) - 1 : -1]
        of_generated = logprobs[torch.arange(len(generated)), torch.tensor(generated)].tolist()
        return Answer(prompt, generated, [math.nan] * (len(prompt) - 1) + of_generated)

    prompts, generated = random_prompts([20, 60, 90], vocabulary=1024), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(5):
            tokens.append(exact.logprobs(tokens)[-1].argmax().item())
        generated.append(tokens[len(prompt) :])
    answers = [answer(p, g, p) for p, g in zip(prompts, generated, strict=True)]
    check_low_precision(answers, exact, plain)
    other = random_prompts([30], vocabulary=1024, seed=9)[0] + prompts[1][30:]
    answers[1] = answer(prompts[1], generated[1], other)
    with pytest.raises(AssertionError, match="behind 60 tokens: error"):
        check_low_precision(answers, exact, plain)


def test_random_weights_give_way_to_weights_that_come_in_parts(tmp_path):
    """As from a trainer: the engine starts without a checkpoint, and gets one tensor after the other."""
    path = save_random(tmp_path)
    with Engine(path, load_format="dummy") as engine:

        def fill(model: torch.nn.Module) -> None:
            initialize_layerwise_reload(model)
            for name, weight in load_file(tmp_path / "model.safetensors").items():
                model.load_weights([(name, weight)])
            finalize_layerwise_reload(model, engine.llm.llm_engine.vllm_config.model_config)

        engine.llm.apply_model(fill)
        answers = engine.answers(random_prompts([1, 20, 33]), 5)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_replaced_by_another_checkpoints(tied, tmp_path):
    paths = [save_random(tmp_path / f"{seed}", seed=seed, tie_word_embeddings=tied) for seed in (0, 1)]
    with Engine(paths[0]) as engine:
        for path in (*paths, paths[0]):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            engine.llm.reset_prefix_cache()
            reference = Reference(path)
            for answer in engine.answers(random_prompts([1, 20, 33]), 5):
                reference.check(answer)
