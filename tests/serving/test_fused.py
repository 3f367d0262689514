"""Engines whose decode step is the fused kernel, against Transformers; without a GPU in Triton's interpreter."""

import os
import pathlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import Engine, Reference, _answer, assert_same, check_low_precision, greedy, random_prompts, save_random
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker import mamba_utils

from vllm_bamba import linear, step_options, stream
from vllm_bamba.linear import SkinnyLinearMethod
from vllm_bamba.mixer import BambaMixer
from vllm_bamba.ops import skinny_linear
from vllm_bamba.ops.skinny_linear import tuning
from vllm_bamba.ops.skinny_linear.tuning import Launch, Tuning
from vllm_bamba.prefix.options import active
from vllm_bamba.state import EIGHT_BITS
from vllm_bamba.warm_up import WarmUps

FUSED = {"bamba_fused_step": True, "bamba_replay": 8}
TESTS = pathlib.Path(__file__).parent.parent
SMALL = {"num_hidden_layers": 3, "attn_layer_indices": [1]}


@pytest.fixture
def anchored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots as with Model Runner V2, which there is for GPUs alone: its model state moves them, V1 copies nothing."""

    def move(output, layout, cache, columns, batch, requests, layers, *args, **kwargs):
        from vllm_bamba.model_state import BambaModelState
        from vllm_bamba.ops.slot_state import LayerSlots

        groups = [[layers[name] for name in group.layer_names] for group in layout.kv_cache_groups]
        of_states = [i for i, members in enumerate(groups) if isinstance(members[0], BambaMixer)]
        rows = [[torch.tensor(requests[name].block_ids[i]).int() for name in batch.req_ids] for i in of_states]
        tables = [pad_sequence(of_group, batch_first=True) for of_group in rows]
        mixers = [(mixer, table) for table, i in enumerate(of_states) for mixer in groups[i]]
        slots = LayerSlots.of(
            [mixer.mixing.slots for mixer, _ in mixers],
            [mixer.A for mixer, _ in mixers],
            [table for _, table in mixers],
            tables,
        )
        state = object.__new__(BambaModelState)
        vars(state).update(_align_mode=True, takes_back=False, cache_config=cache, device=tables[0].device, slots=slots)
        computed = np.array([requests[name].num_computed_tokens for name in batch.req_ids])
        new = np.array([output.num_scheduled_tokens[name] for name in batch.req_ids])
        state.preprocess_state(SimpleNamespace(num_computed_tokens_np=computed, num_scheduled_tokens=new))

    monkeypatch.setattr(mamba_utils, "preprocess_mamba", move)
    monkeypatch.setattr(step_options, "anchors_slots", lambda config, replay: active(config))


@pytest.mark.parametrize(
    ("replay", "changes"), [(0, {}), (8, {"mamba_n_groups": 2}), (8, {"mamba_proj_bias": True})], ids=str
)
def test_answers_equal_transformers(replay, changes, tmp_path):
    path = save_random(tmp_path, **SMALL, **changes)
    with Engine(path, additional_config=FUSED | {"bamba_replay": replay}) as engine:
        answers = engine.answers(random_prompts([1, 20, 33]), [12, 10, 6])
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


def test_chunked_prefill_and_preemption_equal_undisturbed_requests(tmp_path):
    path = save_random(tmp_path, **SMALL)
    with Engine(path, additional_config=FUSED, enable_prefix_caching=False) as engine:
        block = engine.llm.llm_engine.vllm_config.cache_config.block_size
        prompts = random_prompts([block - 3 - i for i in range(4)])
        undisturbed = engine.answers(prompts, 20, prompt_logprobs=False)
    options = {"num_gpu_blocks_override": 11, "max_num_batched_tokens": 256, "enable_prefix_caching": False}
    with Engine(path, additional_config=FUSED, **options) as engine:
        preempt, times = engine.scheduler._preempt_request, []
        engine.scheduler._preempt_request = lambda *a, **k: (times.append(a), preempt(*a, **k))
        disturbed = engine.answers(prompts, 20, prompt_logprobs=False)
    assert times, "the cache was large enough for all: nothing was tested"
    assert_same(undisturbed, disturbed)


@pytest.fixture
def ngrams() -> Iterator[None]:
    """The compiler of vLLM's n-grams leaves a module that vLLM 0.32 fails to search when the next engine starts."""
    yield
    sys.modules.pop("llvmlite.binding.ffi", None)


def test_drafted_tokens_change_no_answer_and_cost_no_states(tmp_path, ngrams):
    """Found by n-grams, of few words so that some are right; prompts end in chunks of any length."""
    words, drafts, replay = 12, 4, 16
    path = save_random(tmp_path, **SMALL, vocab_size=words)
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = {"enable_prefix_caching": False, "disable_log_stats": False, "max_num_batched_tokens": 24}
    step = FUSED | {"bamba_replay": replay}
    states = set()  # of each running sequence, in each group of layers and step
    with Engine(path, **options, additional_config=step, speculative_config=speculative) as engine:
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        of_states = [manager for manager in managers if isinstance(manager.kv_cache_spec, MambaSpec)]
        schedule = engine.scheduler.schedule

        def counting(*args, **kwargs):
            output = schedule(*args, **kwargs)
            states.update(len(blocks) for manager in of_states for blocks in manager.req_to_blocks.values())
            return output

        engine.scheduler.schedule = counting
        answers = engine.answers(random_prompts([21, 60, 1, 33], words), [16, 10, 10, 12], prompt_logprobs=False)
        counted = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
    drafted, accepted = (counted[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < accepted < drafted
    assert states == {1}
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


def test_a_prompt_of_one_token_that_comes_while_others_draft(tmp_path, ngrams):
    """It gets no placeholders of drafts, which would stay in its state."""
    words, drafts = 40, 4
    path = save_random(tmp_path, **SMALL, vocab_size=words)
    options = {"enable_prefix_caching": False, "additional_config": FUSED | {"bamba_replay": 16}}
    options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
    first, second = random_prompts([9, 1], words)
    with Engine(path, **options) as engine:
        inner, outputs = engine.llm.llm_engine, []
        inner.add_request("first", {"prompt_token_ids": first}, greedy(14, False))
        for _ in range(3):
            outputs += inner.step()
        assert not any(output.finished for output in outputs)
        inner.add_request("second", {"prompt_token_ids": second}, greedy(8, False))
        while inner.has_unfinished_requests():
            outputs += inner.step()
    reference, ended = Reference(path), [output for output in outputs if output.finished]
    assert {output.request_id for output in ended} == {"first", "second"}
    for output in ended:
        reference.check(_answer(output))


def test_states_in_the_prefix_cache_carry_their_rings(tmp_path):
    path = save_random(tmp_path, **SMALL)
    first, second, third, fourth = random_prompts([50, 21, 9, 40])
    with Engine(path, additional_config=FUSED) as engine:
        answers = engine.answers([first, third, fourth], 30, prompt_logprobs=False)
        turns = [answer.prompt + answer.generated + second for answer in answers]
        outputs = engine.llm.generate([{"prompt_token_ids": turns[0]}], greedy(1, False), use_tqdm=False)
        assert outputs[0].num_cached_tokens == (len(first) + 29) // 16 * 16  # the last token was never computed
        again = engine.answers(turns, 5, prompt_logprobs=False)
        # from the states that were kept inside of the prefills of these
        outputs = engine.llm.generate([{"prompt_token_ids": turn} for turn in turns], greedy(1, False), use_tqdm=False)
        assert [o.num_cached_tokens for o in outputs] == [(len(turn) - 1) // 16 * 16 for turn in turns]
        resent = engine.answers(turns, 5, prompt_logprobs=False)
    with Engine(path, enable_prefix_caching=False) as engine:
        expected = engine.answers(turns, 5, prompt_logprobs=False)
    assert_same(again, expected)
    assert_same(resent, expected)


def test_anchored_slots_have_what_a_sequence_had_at_its_last_unit(tmp_path, anchored):
    """Answers that end on a unit and behind one, alone and together."""
    path = save_random(tmp_path, **SMALL)
    more = random_prompts([21])[0]
    with Engine(path, additional_config=FUSED | {"bamba_replay": 16}) as engine:
        assert engine.scheduler.slots.anchored
        answers = engine.answers(random_prompts([50, 9, 40]), [20, 24, 12], prompt_logprobs=False)
        answers += engine.answers(random_prompts([33], seed=1), 18, prompt_logprobs=False)
        turns = [answer.prompt + answer.generated + more for answer in answers]
        outputs = engine.llm.generate([{"prompt_token_ids": turn} for turn in turns], greedy(1, False), use_tqdm=False)
        ends = [len(answer.prompt) + len(answer.generated) - 1 for answer in answers]  # nobody computes the last token
        assert [o.num_cached_tokens for o in outputs] == [end // 16 * 16 for end in ends]
        assert 0 in [end % 16 for end in ends]
        again = engine.answers([turn[: end + 5] for turn, end in zip(turns, ends, strict=True)], 6)
    reference = Reference(path)
    for answer in answers + again:
        reference.check(answer)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_embedded_checkpoint_in_bfloat16_with_states_in_8_bits(dtype, tiny):
    options = FUSED | {"bamba_state_dtype": dtype}
    with Engine(tiny, dtype="bfloat16", additional_config=options) as engine:
        answers = engine.answers(random_prompts([5, 20, 40], vocabulary=1024, seed=3), 9)
    check_low_precision(answers, Reference(tiny), Reference(tiny, torch.bfloat16))


@pytest.fixture
def skinny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, and the stream, as where there are launches for a GPU; 16 rows are few, 32 one kernel with a gate."""
    launches = (Launch(8, 32, 32, 2, 2), Launch(16, 64, 32, 3, 4, described=True))
    made = Tuning(launches, launches, launches, gated_whole=(Launch(32, 32, 32, 2, 4, described=True),))

    def use(model: nn.Module, vllm_config: object) -> None:
        for layer in model.modules():
            if isinstance(layer, LinearBase):
                layer.quant_method = SkinnyLinearMethod()

    monkeypatch.setattr(linear, "use_skinny_products", use)
    monkeypatch.setattr(tuning, "tuning_of", lambda device: made)
    for module in (stream, linear):
        monkeypatch.setattr(module, "warm_ups", WarmUps())
    # vLLM's would put the weights in another order, for the CPU's own products
    monkeypatch.setattr(SkinnyLinearMethod, "process_weights_after_loading", lambda self, layer: None)


def test_norms_and_additions_in_products_equal_transformers(skinny, tmp_path, monkeypatch):
    """Few rows and many, in steps of 57, 3, 16, 17, 2 and 1 rows; up to 16 are few."""
    rows: dict[str, set[int]] = {"divided_linear": set(), "added_linear": set()}
    for name, seen in rows.items():
        real = getattr(skinny_linear, name)
        counted = lambda x, *args, real=real, seen=seen: (seen.add(len(x)), real(x, *args))[1]  # noqa: E731
        monkeypatch.setattr(skinny_linear, name, counted)
    path = save_random(tmp_path, **SMALL)
    with Engine(path, dtype="bfloat16", additional_config=FUSED, enforce_eager=False) as engine:
        kinds = engine.llm.apply_model(lambda model: model.model.stream)
        answers = engine.answers(random_prompts([4, 13, 40], seed=3), 6)
        for lengths in ([16], [17], [1, 1]):
            answers += engine.answers(random_prompts(lengths, seed=4), 3)
    assert kinds == [stream.SkinnyStream]
    assert rows["added_linear"] == {1, 2, 3, 8, 16}
    assert rows["divided_linear"] == {1, 2, 3, 8, 16, 17, 32}
    check_low_precision(answers, Reference(path), Reference(path, torch.bfloat16))


def test_8_bit_states_hold_more_sequences(tiny):
    pages = {}
    for name, options in {"bf16": FUSED, "fp8": FUSED | {"bamba_state_dtype": "fp8"}}.items():
        with Engine(tiny, dtype="bfloat16", mamba_ssm_cache_dtype="bfloat16", additional_config=options) as engine:
            layer = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context["model.layers.0.mamba"]
            slots = layer.mixing.slots
            assert slots is layer.mixing.slots
            pages[name] = slots.ssm[0].nbytes + (0 if slots.scale is None else slots.scale[0].nbytes)
            layer.kv_cache = tuple(tensor.clone() for tensor in layer.kv_cache)  # as where vLLM makes its cache anew
            assert layer.mixing.slots.conv.data_ptr() == layer.kv_cache[0].data_ptr() != slots.conv.data_ptr()
    assert pages["fp8"] < 0.6 * pages["bf16"]


@pytest.mark.multiprocess
def test_two_ranks_equal_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # ranks are processes of their own, which need the interpreter as conftest makes it
    start = "from triton_interpreter import use_interpreter_without_a_gpu as use; use()\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]))
    path = save_random(tmp_path / "model", **SMALL)
    with Engine(path, additional_config=FUSED, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        answers = engine.answers(random_prompts([1, 20, 33]), 10)
    reference = Reference(path)
    for answer in answers:
        reference.check(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bamba_fused_step": 1}, "bamba_fused_step is 1, expected true or false"),
        ({"bamba_fused_step": True, "bamba_replay": 5}, "bamba_replay is 5, expected one of"),
        ({"bamba_fused_step": True, "bamba_state_dtype": ["int8"]}, "bamba_state_dtype is .'int8'., expected one of"),
        ({"bamba_state_dtype": "int8"}, "need bamba_fused_step: true"),
        ({"bamba_fused": True}, "bamba_fused unknown, there are .*bamba_fused_step"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, tmp_path):
    path = save_random(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=message), Engine(path, additional_config=options):
        pass


def test_heads_that_tensor_cores_do_not_take_are_refused(tmp_path):
    path = save_random(tmp_path, **SMALL, mamba_n_heads=16, mamba_d_head=8)
    with pytest.raises(ValueError, match="mamba_d_head = 8 is no power of two"), Engine(path, additional_config=FUSED):
        pass


def test_without_a_gpu_the_step_is_refused(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    path = save_random(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="there is no NVIDIA GPU"), Engine(path, additional_config=FUSED):
        pass
