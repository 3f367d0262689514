"""Tensor, pipeline and data parallelism on two CPU cores give what one process gives."""

import asyncio

import pytest
from parity import Answer, Engine, Reference, _answer, assert_same, greedy, random_prompts, save_random
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

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


def test_stages_with_and_without_attention_lay_states_out_alike(tmp_path):
    """A stage alone does not see the attention whose blocks vLLM makes a state's page as long as."""
    path = save_random(tmp_path, attn_layer_indices=[1])
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "additional_config": {"bamba_prefix_slots": False}}
    with Engine(path, **options, **TWO_WORKERS) as engine:
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        states = {group.kv_cache_spec for group in groups if hasattr(group.kv_cache_spec, "mamba_type")}
        prompts = random_prompts([300, 300])
        prompts += [prompts[0], prompts[0][:200] + prompts[1]]
        answers = [engine.answers([prompt], 4, prompt_logprobs=False)[0] for prompt in prompts]
    assert len({(spec.block_size, spec.page_size_bytes) for spec in states}) == 1
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


async def answers_of_two_engines(path: str) -> tuple[list[Answer], ...]:
    """All prompts sent to the first engine, to the second, and to whichever vLLM chooses."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            path,
            data_parallel_size=2,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=8,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=64 << 20,
        )
    )

    async def answer(prompt: list[int], rank: int | None) -> Answer:
        name = f"{len(prompt)} tokens for {rank}"
        request = engine.generate({"prompt_token_ids": prompt}, greedy(12), name, data_parallel_rank=rank)
        *_, last = [output async for output in request]
        return _answer(last)

    try:
        return tuple([await asyncio.gather(*(answer(p, rank) for p in PROMPTS)) for rank in (0, 1, None)])
    finally:
        engine.shutdown()


def test_data_parallel_equals_transformers_on_each_engine(tmp_path):
    path = save_random(tmp_path)
    answers = asyncio.run(answers_of_two_engines(path))
    reference = Reference(path)
    with Engine(path) as engine:
        alone = engine.answers(PROMPTS)
    for of_rank in answers:
        for answer in of_rank:
            reference.check(answer)
        assert_same(of_rank, alone)
