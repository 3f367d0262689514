"""Quantised checkpoints: the engine equals Transformers with the same rounded weights and the same rounded inputs.

The checkpoints are written here, in formats of compressed-tensors, GPTQ and AWQ, under Bamba's own names. Each
projection's rows are given sizes of their own first, so that a scale that reaches the wrong row shows.
"""

import copy
import json
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from parity import LIMIT, Answer, Engine, Reference, check_low_precision, config, random_prompts, save_random
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BambaForCausalLM
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

# sizes that vLLM's CPU kernels take: in_proj has 384 rows, and 224 a rank where two ranks hold a copy of its group
SIZES = {"mamba_n_heads": 64, "mamba_d_head": 2, "mamba_d_state": 32, "num_key_value_heads": 1}
PROMPTS = random_prompts([1, 2, 3, 4, 5, 6, 7, 20, 33])
SPLIT_INPUTS = ("out_proj", "o_proj", "down_proj")  # with tensor parallelism each rank rounds its own part


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-12)


def fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and, for each row, their scale."""
    scale = largest(x) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = largest(x) / 127
    return (x / scale).round().to(torch.int8), scale


def rounded(x: torch.Tensor, quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    numbers, scale = quantise(x.float())
    return (numbers.float() * scale).to(x.dtype)


def store_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    numbers, scale = fp8(weight)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def store_int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    numbers, scale = int8(weight)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from -8 to 7 as [rows, groups, 32 inputs], and the scale of each group."""
    groups = weight.unflatten(1, (-1, 32))
    scale = (largest(groups) / 7).bfloat16().float()  # what the engine makes of it
    return (groups / scale).round().clamp(-8, 7), scale


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers from 0 to 15 of the last dimension in an int32, the first in its lowest bits."""
    eights = (numbers.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return eights.where(eights < 2**31, eights - 2**32).int()


def store_int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    numbers, scale = int4(weight)
    stored = {
        "weight_packed": packed(numbers.flatten(1) + 8),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, (numbers * scale).flatten(1)


def store_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Transposed; zero points are one less than meant, each input's group is noted, and there is a bias of zeros."""
    numbers, scale = int4(weight)
    stored = {
        "qweight": packed(numbers.flatten(1) + 8).t(),
        "qzeros": packed(torch.full_like(scale.squeeze(-1).t(), 8 - 1)),
        "scales": scale.squeeze(-1).t().half(),
        "g_idx": torch.arange(weight.shape[1]).int() // 32,
        "bias": torch.zeros(len(weight)),
    }
    return stored, (numbers * scale).flatten(1)


def store_awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Transposed, with a zero point for each group of 32 inputs; of eight rows, even ones are in the lower 16 bits."""
    groups = weight.unflatten(1, (-1, 32))
    least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (-least / scale).round().clamp(0, 15)
    numbers = ((groups / scale).round() + zero).clamp(0, 15)

    def interleaved(rows: torch.Tensor) -> torch.Tensor:
        return packed(rows.t().unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2))

    stored = {
        "qweight": interleaved(numbers.flatten(1)),
        "qzeros": interleaved(zero.squeeze(-1)),
        "scales": scale.squeeze(-1).t().half(),
    }
    return stored, ((numbers - zero) * scale).flatten(1)


@dataclass(frozen=True)
class Scheme:
    """How a projection is stored and how its input is rounded.

    Attributes:
        describe: modules that are not quantised -> what config.json says.
        store: weight -> the checkpoint's tensors by their last names, and the weight that they stand for.
        round_input: the same for [.., channels] of an input, one scale a row.
    """

    describe: Callable[[list[str]], dict[str, object]]
    store: Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
    round_input: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def compressed_tensors(
    layout: str, weights: dict[str, object], activations: dict[str, object] | None
) -> Callable[[list[str]], dict[str, object]]:
    return lambda ignore: {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "ignore": ignore,
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }


def arguments(bits: int, kind: str, strategy: str, **more: object) -> dict[str, object]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | more


FP8 = Scheme(
    compressed_tensors(
        "float-quantized", arguments(8, "float", "channel"), arguments(8, "float", "token", dynamic=True)
    ),
    store_fp8,
    lambda x: rounded(x, fp8),
)
INT8 = Scheme(
    compressed_tensors("int-quantized", arguments(8, "int", "channel"), arguments(8, "int", "token", dynamic=True)),
    store_int8,
    lambda x: rounded(x, int8),
)
INT4 = Scheme(compressed_tensors("pack-quantized", arguments(4, "int", "group", group_size=32), None), store_int4)
GPTQ = Scheme(
    lambda ignore: {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}, store_gptq
)
AWQ = Scheme(lambda ignore: {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, store_awq)


def save_quantised(
    folder: pathlib.Path, scheme: Scheme, ignore: tuple[str, ...] = (), ranks: int = 1, **changes: object
) -> BambaForCausalLM:
    """Write a random checkpoint whose projections, but for those ignored, are quantised.

    Returns:
        Transformers' model of what the checkpoint says, rounding inputs as `ranks` ranks do.
    """
    changes = SIZES | changes
    save_random(folder, **changes)
    file = folder / "model.safetensors"
    stored, meant = {}, {}
    spread = torch.Generator().manual_seed(3)
    quantised = []
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            tensor = tensor * (0.5 + torch.rand(len(tensor), 1, generator=spread))
        if not module.endswith("_proj") or module in ignore:
            stored[name] = meant[name] = tensor
            continue
        quantised.append(module)
        tensors, meant[name] = scheme.store(tensor)
        stored |= {f"{module}.{last}": t.contiguous() for last, t in tensors.items()}
    save_file(stored, file, {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = scheme.describe(["lm_head", *ignore])
    (folder / "config.json").write_text(json.dumps(described))

    model = BambaForCausalLM(config(**changes))
    model.load_state_dict(meant)
    for name in quantised:
        parts = ranks if name.endswith(SPLIT_INPUTS) else 1

        def round_input(_: nn.Module, inputs: tuple[torch.Tensor], parts: int = parts) -> torch.Tensor:
            return torch.cat([scheme.round_input(x) for x in inputs[0].chunk(parts, -1)], -1)

        model.get_submodule(name).register_forward_pre_hook(round_input)
    return model


def check_rounded(answers: list[Answer], model: BambaForCausalLM) -> None:
    """Assert that logprobs are those of `model`, which rounds the inputs of its projections, but for a few flips.

    Where an input lies on the border of two fp8 numbers, the last bit of fp32 decides which it becomes, and whatever
    follows from it is rounded anew. That is rare: most requests must be within `LIMIT`, which they are not with any
    scale out of place. The others may be as far off as two roundings of everything are from each other.
    """
    rounding, unrounded = Reference(model), Reference(without_rounding(model))
    close = 0
    for answer in answers:
        tokens = torch.tensor(answer.prompt + answer.generated)
        of_tokens = torch.arange(len(tokens) - 1), tokens[1:]
        expected = rounding.logprobs(tokens.tolist())[of_tokens]
        effect = (unrounded.logprobs(tokens.tolist())[of_tokens] - expected).square().mean().sqrt()
        error = torch.tensor(answer.logprobs) - expected
        assert error.square().mean().sqrt() <= math.sqrt(2) * effect
        close += error.abs().max().item() <= LIMIT
    assert 2 * close > len(answers), f"only {close} of {len(answers)} requests are within {LIMIT:.0e}"


def without_rounding(model: BambaForCausalLM) -> BambaForCausalLM:
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return model


def test_fp8_equals_transformers(tmp_path):
    model = save_quantised(tmp_path, FP8)
    with Engine(str(tmp_path)) as engine:
        answers = engine.answers(PROMPTS)
    check_rounded(answers, model)


@pytest.mark.parametrize("scheme", [INT8, INT4, GPTQ, AWQ], ids=["int8", "int4_weights", "gptq", "awq"])
def test_scheme_is_as_close_as_transformers_in_bf16(scheme, tmp_path, monkeypatch):
    """vLLM's CPU kernels for these take 16-bit inputs only."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # else vLLM rounds int4's inputs too, where the CPU has AMX
    model = save_quantised(tmp_path, scheme)
    with Engine(str(tmp_path), dtype="bfloat16") as engine:
        answers = engine.answers(PROMPTS)
    check_low_precision(answers, Reference(model), Reference(copy.deepcopy(model).bfloat16()))


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not_listed"])
def test_awq_may_leave_a_mixer_alone_as_a_whole_or_in_part(listed, tmp_path):
    """Where config.json does not list what is not quantised, vLLM goes by the types of tensors."""
    named = ["lm_head", "model.layers.0.mamba", "model.layers.2.mamba.out_proj"]
    scheme = replace(AWQ, describe=lambda ignore: AWQ.describe(ignore) | {"modules_to_not_convert": named * listed})
    ignore = ("model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj", "model.layers.2.mamba.out_proj")
    model = save_quantised(tmp_path, scheme, ignore)
    with Engine(str(tmp_path), dtype="bfloat16") as engine:
        answers = engine.answers(PROMPTS)
    check_low_precision(answers, Reference(model), Reference(copy.deepcopy(model).bfloat16()))


def test_ignore_list_names_the_checkpoints_modules(tmp_path):
    """Each of vLLM's fused layers and each of Bamba's own, left alone in one layer and quantised in another."""
    ignore = (
        "model.layers.0.mamba.in_proj",
        "model.layers.2.mamba.out_proj",
        *(f"model.layers.1.self_attn.{which}_proj" for which in "qkv"),
        "model.layers.3.self_attn.o_proj",
        *(f"model.layers.2.feed_forward.{which}_proj" for which in ("gate", "up")),
        "model.layers.0.feed_forward.down_proj",
    )
    model = save_quantised(tmp_path, FP8, ignore)
    with Engine(str(tmp_path)) as engine:
        plain = engine.llm.apply_model(
            lambda served: {
                name
                for name, module in served.named_modules()
                if isinstance(module, LinearBase) and isinstance(module.quant_method, UnquantizedLinearMethod)
            }
        )[0]
        answers = engine.answers(PROMPTS)
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    names = [name.rsplit(".", 1) for name in ignore]
    assert plain == {f"{parent}.{fused.get(last, last)}" for parent, last in names}
    check_rounded(answers, model)


@pytest.mark.multiprocess
def test_scales_follow_their_rows_to_two_ranks(tmp_path, monkeypatch):
    """The one group's rows of in_proj, and the scales of these rows, are copied to both."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_quantised(tmp_path, FP8, ranks=2)
    assert model.config.mamba_n_groups == 1
    with Engine(str(tmp_path), tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        answers = engine.answers(PROMPTS)
    check_rounded(answers, model)
