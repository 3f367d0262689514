"""Bad input ends early, in an error that names the cause; the next engine in the process works."""

import json
import pathlib

import pytest
from parity import Engine, random_prompts, save_random
from safetensors.torch import load_file, save_file


def edit_config(path: str, **changes: object) -> None:
    file = pathlib.Path(path, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path: str, edit) -> None:
    file = pathlib.Path(path, "model.safetensors")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(path: str, **options: object) -> str:
    """The message with which the engine refuses to start."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  vLLM wraps some errors in its own
        Engine(path, **options)
    return str(caught.value)


def test_configuration_of_another_model_is_named(tmp_path):
    path = save_random(tmp_path)
    edit_config(path, model_type="llama")
    assert "model_type is 'llama'" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mamba_d_conv": 5}, "mamba_d_conv = 5"),
        ({"attn_layer_indices": [1, 9]}, "attn_layer_indices names layers [9]"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mamba_n_groups": 3}, "mamba_n_groups = 3"),
        ({"mamba_chunk_size": 48}, "mamba_chunk_size = 48"),
    ],
)
def test_unsupported_field_is_named(changes, field, tmp_path):
    path = save_random(tmp_path)
    edit_config(path, **changes)
    assert field in refusal(path)


def test_impossible_tensor_parallel_size_is_named_with_the_possible_ones(tmp_path):
    message = refusal(save_random(tmp_path), tensor_parallel_size=3, distributed_executor_backend="mp")
    assert "tensor_parallel_size = 3" in message
    assert "[1, 2]" in message


def test_speculation_without_a_gpu_is_refused(tmp_path):
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    path = save_random(tmp_path)
    assert "speculative decoding of Bamba needs a GPU" in refusal(path, speculative_config=speculation)
    asked = {"speculative_config": speculation, "additional_config": {"bamba_fused_step": True}}
    assert "--no-enable-prefix-caching" in refusal(path, **asked)


def test_prefetched_weights_are_refused(tmp_path):
    assert "leave --offload-group-size out" in refusal(save_random(tmp_path), offload_group_size=2)


def test_missing_shard_is_named(tmp_path):
    path = save_random(tmp_path, shard_size="100KB")
    shards = sorted(pathlib.Path(path).glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert shards[1].name in refusal(path)


def test_truncated_file_is_named(tmp_path):
    path = save_random(tmp_path)
    file = pathlib.Path(path, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    message = refusal(path)
    assert str(file) in message
    assert "fetch it again" in message


def test_missing_and_left_over_weights_are_listed(tmp_path):
    path = save_random(tmp_path)

    def edit(weights):
        weights["model.layers.0.mamba.mystery"] = weights.pop("model.layers.0.mamba.A_log")
        del weights["model.layers.1.self_attn.k_proj.weight"]

    edit_weights(path, edit)
    message = refusal(path)
    assert "Missing 2: model.layers.0.mamba.A_log, model.layers.1.self_attn.k_proj.weight" in message
    assert "Left over 1: model.layers.0.mamba.mystery" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mamba.in_proj.weight",
        "model.layers.0.mamba.conv1d.weight",
        "model.layers.0.mamba.D",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.feed_forward.up_proj.weight",
        "model.final_layernorm.weight",
    ],
)
def test_weight_of_a_wrong_shape_is_named(name, tmp_path):
    path = save_random(tmp_path)
    edit_weights(path, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    assert name in refusal(path)


def test_prompt_beyond_the_context_is_refused_and_the_next_request_served(tmp_path):
    path = save_random(tmp_path)
    with Engine(path, max_model_len=64) as engine:
        with pytest.raises(Exception, match="maximum context length is 64 tokens"):
            engine.answers(random_prompts([80]))
        assert len(engine.answers(random_prompts([20]), 5)[0].generated) == 5


def test_original_mamba_ssm_names_load_to_the_same_model(tmp_path):
    from names import in_mamba_ssms_names
    from parity import assert_same

    path = save_random(tmp_path / "current")
    original = save_random(tmp_path / "original")

    def rename(weights):
        renamed = in_mamba_ssms_names(weights)
        weights.clear()
        weights.update(renamed)

    edit_weights(original, rename)
    prompts = random_prompts([20, 3])
    with Engine(path) as engine:
        expected = engine.answers(prompts)
    with Engine(original) as engine:
        assert_same(engine.answers(prompts), expected)
