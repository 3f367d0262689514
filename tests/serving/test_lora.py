"""PEFT adapters on every projection: the engine with an adapter equals the merged model in Transformers."""

import pytest
import torch
from parity import Engine, Reference, config, random_prompts, save_random
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BambaForCausalLM
from vllm.lora.request import LoRARequest

PROJECTIONS = [
    "in_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]
PROMPTS = random_prompts([1, 5, 20, 33])


def save_adapter(base: str, folder: str, targets: list[str]) -> BambaForCausalLM:
    """Write a random adapter of rank 8; returns the base model with it merged in."""
    torch.manual_seed(7)
    model = get_peft_model(
        BambaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules=targets),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    merged: PeftModel = model.merge_and_unload()
    return merged


def check(path: str, adapter: str, merged: BambaForCausalLM, **options: object) -> None:
    request = LoRARequest("adapter", 1, adapter)
    with Engine(path, enable_lora=True, max_lora_rank=8, **options) as engine:
        # no prompt logprobs: with LoRA, vLLM's CPU engine fails when it computes them
        adapted = engine.answers(PROMPTS, 24, prompt_logprobs=False, lora_request=request)
        plain = engine.answers(PROMPTS, 24, prompt_logprobs=False)
        half = [None, request] * (len(PROMPTS) // 2)
        mixed = engine.answers(PROMPTS, 24, prompt_logprobs=False, lora_request=half)
    base, with_adapter = Reference(path), Reference(merged)
    for answer, of_request in zip(mixed, half, strict=True):
        (with_adapter if of_request else base).check(answer)
    for answer in adapted:
        with_adapter.check(answer)
    for answer in plain:
        base.check(answer)
    assert [a.generated for a in adapted] != [a.generated for a in plain], "the adapter changed nothing"


@pytest.mark.parametrize("targets", [PROJECTIONS, ["in_proj"], ["out_proj"]], ids=["all", "in_proj", "out_proj"])
def test_adapter_equals_merged_model(targets, tmp_path):
    path = save_random(tmp_path / "base")
    merged = save_adapter(path, str(tmp_path / "adapter"), targets)
    check(path, str(tmp_path / "adapter"), merged)


@pytest.mark.parametrize("size", [1, 2])
def test_warm_up_adapter_of_fewer_rows_is_passed_on_and_a_real_one_refused(size, monkeypatch):
    """Before it captures CUDA graphs vLLM sets adapters of zeros, as long as one rank's part of the first slice."""
    from types import SimpleNamespace

    from vllm_bamba import lora
    from vllm_bamba.mixer import InProjectionLinear
    from vllm_bamba.sharding import MixerShard

    shard = MixerShard(heads=4, head_dim=8, groups=1, state=16, size=size)
    layer = lora.InProjectionWithLoRA.__new__(lora.InProjectionWithLoRA)
    base = SimpleNamespace(
        shard=shard, with_copies=lambda loaded, dim: InProjectionLinear.with_copies(base, loaded, dim)
    )
    layer.__dict__["base_layer"] = base
    given = []
    parent = lora.MergedColumnParallelLinearVariableSliceWithLoRA
    monkeypatch.setattr(parent, "set_lora", lambda self, index, a, b: given.append(b))
    rows, a = shard.in_proj_sources[-1].stop, torch.zeros(2, 6)
    layer.set_lora(0, a, torch.zeros(32 // size, 2))
    layer.set_lora(0, a, torch.ones(rows, 2))
    assert [len(b) for b in given] == [32 // size, sum(shard.in_proj_sizes)]
    with pytest.raises(ValueError, match="lora_B of in_proj"):
        layer.set_lora(0, a, torch.ones(rows - 1, 2))


@pytest.mark.multiprocess
def test_adapter_follows_groups_that_are_copied_to_both_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert config().mamba_n_groups == 1
    path = save_random(tmp_path / "base")
    merged = save_adapter(path, str(tmp_path / "adapter"), PROJECTIONS)
    check(path, str(tmp_path / "adapter"), merged, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_weights_are_reloaded_beneath_an_adapter(tmp_path):
    """As a trainer of the base model does: adapters stay what they were."""
    paths = [save_random(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1)]
    merged = [save_adapter(path, str(tmp_path / "adapter"), PROJECTIONS) for path in paths]  # the same for both
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with Engine(paths[0], enable_lora=True, max_lora_rank=8) as engine:
        for path, with_adapter in zip(paths, merged, strict=True):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            engine.llm.reset_prefix_cache()
            adapted = engine.answers(PROMPTS, prompt_logprobs=False, lora_request=request)
            plain = engine.answers(PROMPTS, prompt_logprobs=False)
            for answers, reference in ((adapted, Reference(with_adapter)), (plain, Reference(path))):
                for answer in answers:
                    reference.check(answer)
