"""Parity on GPUs with defaults: bf16, CUDA graphs, chunked prefill, prefix caching; some with torch.compile."""

import pytest
import torch
from parity import (
    Engine,
    Reference,
    _answer,
    assert_same,
    check_low_precision,
    greedy,
    random_prompts,
    save_random,
)
from test_parity import CONFIGURATIONS as ON_CPUS
from traffic import traffic
from transformers import AutoConfig
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CompilationMode, CUDAGraphMode

from vllm_bamba.config import BambaShape
from vllm_bamba.prefill_graphs import PrefillGraphs
from vllm_bamba.prefix.options import active
from vllm_bamba.step_options import slot_format

pytestmark = pytest.mark.gpu

# head sizes that FlashAttention has kernels for; otherwise as small as on the CPU
WIDE = {"hidden_size": 128, "mamba_d_head": 64, "mamba_d_state": 32, "num_key_value_heads": 2}
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 30,
}
BF16 = DEFAULTS | {"mamba_ssm_cache_dtype": "bfloat16"}  # states too, unless a step has others
LENGTHS = [1, 2, 4, 15, 16, 17, 100, 300]
STEPS = {  # the decode step
    "vllm_step": {"bamba_fused_step": False},
    "fused_step": {"bamba_fused_step": True},
    "fused_step_int8": {"bamba_fused_step": True, "bamba_state_dtype": "int8"},
}
FP8 = {"bamba_fused_step": True, "bamba_state_dtype": "fp8"}
COMPILED = {"mode": CompilationMode.VLLM_COMPILE}
PADDED = COMPILED | {"inductor_compile_config": {"force_shape_pad": True}}  # products, if Inductor may pad any
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())

CONFIGURATIONS = ON_CPUS | {
    "all_biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    "chunks_of_256": {"mamba_chunk_size": 256},
    "sums_long_enough_for_skinny_products": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "mamba_n_heads": 16,
        "num_attention_heads": 16,
    },
}


def references(path: str) -> tuple[Reference, Reference]:
    return Reference(path), Reference(path, torch.bfloat16)


def check_small_model(folder, changes, **options):
    """Prompts of all lengths at once, answered by a random model in an engine with these options."""
    path = save_random(folder, **(WIDE | changes))
    with Engine(path, **BF16, **options) as engine:
        answers = engine.answers(random_prompts(LENGTHS), 16)
    check_low_precision(answers, *references(path))


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@each_step
def test_small_configurations_equal_transformers(step, changes, tmp_path):
    check_small_model(tmp_path, changes, additional_config=step)


@each_step
def test_products_that_inductor_would_pad_equal_transformers(step, tmp_path):
    """Whatever it finds faster: 580 rows of in_proj are not a multiple of 8."""
    check_small_model(tmp_path, {}, additional_config=step, compilation_config=PADDED)


@pytest.mark.parametrize(
    "ways",
    [{}, {"compilation_config": COMPILED}, {"enforce_eager": True}],
    ids=["default", "compiled_with_cuda_graphs", "eager"],
)
@pytest.mark.parametrize("step", [*STEPS.values(), FP8], ids=[*STEPS, "fused_step_fp8"])
def test_embedded_checkpoint_equals_transformers(step, ways, tiny):
    prompts = random_prompts([1, 3, 64, 200, 700], vocabulary=1024)
    options = BF16 | ways | {"max_model_len": 1024, "additional_config": step}
    with Engine(tiny, **options) as engine:
        assert engine.llm.llm_engine.vllm_config.use_v2_model_runner
        answers = engine.answers(prompts, 64)
    check_low_precision(answers, *references(tiny))


@each_step
def test_model_runner_v1_equals_transformers(step, tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    try:
        with Engine(tiny, **BF16, additional_config=step) as engine:
            assert not engine.llm.llm_engine.vllm_config.use_v2_model_runner
            answers = engine.answers(random_prompts([1, 50, 300], vocabulary=1024), 40)
            answers += engine.answers(random_prompts([1] * 6, vocabulary=1024, seed=1), 20)  # the graphs of decodes'
    finally:  # it forbids graphs to be captured when its own are, and V2 in the same process does not allow it again
        set_cudagraph_capturing_enabled(True)
    check_low_precision(answers, *references(tiny))


@each_step
def test_chunked_prefill_equals_transformers(step, tiny):
    with Engine(tiny, **BF16, max_num_batched_tokens=48, max_num_seqs=4, additional_config=step) as engine:
        answers = engine.answers(random_prompts([1, 50, 130, 300], vocabulary=1024), 16)
    check_low_precision(answers, *references(tiny))


@pytest.mark.parametrize("heads", [{"mamba_n_heads": 8, "mamba_d_head": 32}, {}], ids=["584_rows", "580_rows"])
@pytest.mark.parametrize("step", [STEPS["vllm_step"], STEPS["fused_step"]], ids=["vllm_step", "fused_step"])
def test_adapter_equals_merged_model_and_leaves_other_requests_alone(step, heads, tmp_path):
    from test_lora import PROJECTIONS, save_adapter
    from vllm.lora.request import LoRARequest

    path = save_random(tmp_path / "base", **WIDE | heads)
    merged = save_adapter(path, str(tmp_path / "adapter"), PROJECTIONS)
    merged.save_pretrained(tmp_path / "merged")
    requests = [None, LoRARequest("adapter", 1, str(tmp_path / "adapter"))] * 2
    options = {"enable_lora": True, "max_lora_rank": 8, "compilation_config": PADDED, "additional_config": step}
    with Engine(path, **BF16, **options) as engine:
        answers = engine.answers(random_prompts([1, 5, 20, 33]), 24, prompt_logprobs=False, lora_request=requests)
    check_low_precision(answers[0::2], *references(path))
    check_low_precision(answers[1::2], *references(str(tmp_path / "merged")))


@each_step
def test_more_sequences_that_drain_to_one_equal_transformers(step, tiny):
    prompts = random_prompts([7 + 3 * i for i in range(20)], vocabulary=1024, seed=5)
    with Engine(tiny, **BF16, max_num_seqs=32, additional_config=step) as engine:
        answers = engine.answers(prompts, [20 + 4 * i for i in range(20)], prompt_logprobs=False)
    check_low_precision(answers, *references(tiny))


def test_layers_whose_weights_come_when_they_are_called(tiny):
    with Engine(tiny, **DEFAULTS, cpu_offload_gb=0.01) as engine:
        assert engine.llm.apply_model(lambda model: model.model.one_by_one) == [True]
        answers = engine.answers(random_prompts([1, 50, 300], vocabulary=1024), 20)
    check_low_precision(answers, *references(tiny))


@pytest.mark.parametrize("eager", [False, True], ids=["cuda_graphs", "eager"])
@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("step", [None, *STEPS.values()], ids=["with_prefix_caching", *STEPS])
def test_drafted_tokens_change_no_answer(step, drafts, eager, tiny):
    """Found by n-grams: some are accepted, and some taken back. With prefix caching the fused step gives way.

    Prompts of one token come while others decode.
    """
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = BF16 | {"enforce_eager": eager, "disable_log_stats": False, "speculative_config": speculative}
    options |= {} if step is None else {"enable_prefix_caching": False, "additional_config": step}
    prompts = [3 * prompt for prompt in random_prompts([7, 20, 60, 1], vocabulary=1024)] + [[5], [9]]
    with Engine(tiny, **options, max_num_seqs=4) as engine:
        answers = engine.answers(prompts, [60, 48, 30, 60, 20, 20], prompt_logprobs=False)
        counted = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
    drafted, accepted = (counted[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < accepted < drafted
    check_low_precision(answers, *references(tiny))


@each_step
def test_what_is_found_in_the_prefix_cache_equals_transformers(step, tiny):
    first, second, third = random_prompts([300, 45, 100], vocabulary=1024)
    with Engine(tiny, **BF16, max_model_len=1024, additional_config=step | {"bamba_prefix_slots": True}) as engine:

        def ask(prompt):
            outputs = engine.llm.generate([{"prompt_token_ids": prompt}], greedy(21, False), use_tqdm=False)
            return _answer(outputs[0]), outputs[0].num_cached_tokens

        seen = [ask(first), ask(first)]
        seen.append(ask(seen[0][0].prompt + seen[0][0].generated + second))
        seen += [ask(first[:250] + second), ask(first[:250] + third)]
    assert [cached for _, cached in seen] == [0, 288, 320, 0, 240]
    check_low_precision([answer for answer, _ in seen], *references(tiny))


def test_what_nobody_asked_for_is_the_fused_step_with_prefix_slots(tiny):
    prompts = random_prompts([1, 50, 300], vocabulary=1024)
    with Engine(tiny, **DEFAULTS) as engine:
        config = engine.llm.llm_engine.vllm_config
        form = slot_format(config, BambaShape.from_hf(config.model_config.hf_config))
        assert form is not None
        assert form.anchored
        assert form.state_dtype == torch.int8
        assert active(config)
        assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
        assert config.compilation_config.mode == CompilationMode.NONE
        answers = engine.answers(prompts, 16)
    check_low_precision(answers, *references(tiny))


@each_step
def test_answers_that_pass_a_block_of_vllms_own_caching_equal_transformers(step, tiny):
    with Engine(tiny, **BF16, max_model_len=1024, additional_config=step | {"bamba_prefix_slots": False}) as engine:
        block = engine.llm.llm_engine.vllm_config.cache_config.block_size
        prompts = random_prompts([block - 5, block - 1, block, 2 * block - 3, 2 * block + 1], vocabulary=1024)
        answers = engine.answers(prompts, 16, prompt_logprobs=False)
        answers += engine.answers(prompts, 16, prompt_logprobs=False)  # from the cache
    check_low_precision(answers, *references(tiny))


@each_step
def test_short_prompts_whose_prefills_are_graphs_equal_transformers(step, tiny, monkeypatch):
    """Alone and together, new and continued from the cache."""
    run, seen = PrefillGraphs.run, []

    def noted(self, projected, sequences, *given):
        seen.append(sequences if run(self, projected, sequences, *given) else 0)
        return seen[-1] > 0

    monkeypatch.setattr(PrefillGraphs, "run", noted)
    layers = AutoConfig.from_pretrained(tiny).layers_block_type.count("linear_attention")
    prompts = random_prompts([1, 31, 33, 129, 700, 1100], vocabulary=1024)
    others = [prompt[::-1] for prompt in prompts[1:4]]
    options = BF16 | {"max_model_len": 1200, "additional_config": step | {"bamba_prefix_slots": True}}
    with Engine(tiny, **options) as engine:
        answers = [engine.answers([prompt], 5, prompt_logprobs=False)[0] for prompt in prompts]
        assert seen == [1] * layers * len(prompts)
        for together in ([[*prompt, 7, 8, 9] for prompt in prompts], others):
            seen.clear()
            answers += engine.answers(together, 5, prompt_logprobs=False)
            assert seen == [len(together)] * layers
    check_low_precision(answers, *references(tiny))


def check_random_traffic(step, path, blocks=110, **options):
    """Shared heads, branches, resends, chats and aborts: answers from the cache are as good as any."""
    options = BF16 | options | {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 96}
    with Engine(path, **options, additional_config=step | {"bamba_prefix_slots": True}) as engine:
        seen = traffic(engine, seed=3, requests=60)
    assert len(seen.answers) >= 48
    check_low_precision(seen.answers, *references(path))
    return seen


@each_step
def test_random_traffic_with_prefix_slots_equals_transformers(step, tiny):
    assert check_random_traffic(step, tiny).hits >= 15


def test_random_traffic_that_is_preempted_equals_transformers(tiny):
    assert check_random_traffic(STEPS["fused_step"], tiny, blocks=40).preempted


def test_answers_without_blocks_to_move_to_equal_transformers(tiny):
    """vLLM's operators have slots that are not anchored."""
    assert check_random_traffic(STEPS["vllm_step"], tiny, blocks=40).in_place


@pytest.mark.gpu2
@each_step
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_equal_transformers(split, step, tiny):
    with Engine(tiny, **BF16, **{split: 2}, additional_config=step) as engine:
        answers = engine.answers(random_prompts([1, 50, 300], vocabulary=1024), 16)
    check_low_precision(answers, *references(tiny))


@pytest.mark.gpu2
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_random_traffic_on_two_gpus_equals_transformers(split, tiny):
    check_random_traffic(STEPS["fused_step"], tiny, **{split: 2})


@each_step
def test_repeated_run_gives_the_same_tokens(step, tiny):
    prompts = random_prompts([5, 80, 300], vocabulary=1024)
    with Engine(tiny, **BF16, enable_prefix_caching=False, additional_config=step) as engine:
        first, second = engine.answers(prompts, 32), engine.answers(prompts, 32)
    assert_same(first, second, limit=0.0)
