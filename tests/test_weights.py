"""From checkpoint names to parameters: nothing missing, nothing left over, nothing of another shape."""

import json
import pathlib
import struct
from types import SimpleNamespace

import pytest
import torch
from names import in_mamba_ssms_names
from safetensors.torch import save_file
from torch import nn
from transformers import BambaConfig, BambaForCausalLM
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from vllm_bamba.config import BambaShape
from vllm_bamba.mixer import CausalConv1d, GatedRMSNorm, InProjectionLinear, sharded_parameter
from vllm_bamba.sharding import MixerShard
from vllm_bamba.weights import check_files, current_names, load_weights

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
}


def config(**changes: object) -> BambaConfig:
    return BambaConfig(**(SMALL | changes))


# names of mamba_ssm


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
        {"mamba_conv_bias": False},
        {"attn_layer_indices": None},
    ],
    ids=str,
)
def test_mamba_ssms_names_and_stacks_become_transformers(changes: dict[str, object]) -> None:
    cfg = config(**changes)
    state = BambaForCausalLM(cfg).state_dict()
    for number, tensor in enumerate(state.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * number)  # no two alike
    original = in_mamba_ssms_names(state)
    assert {name.split(".")[0] for name in original} == {"backbone", "lm_head"}
    names = {name.split(".", 3)[-1] for name in original if ".layers." in name}
    assert {"mixer.A_log", "mixer.in_proj.weight", "norm.weight", "norm2.weight", "mlp.fc1.weight"} <= names
    current = list(current_names(original.items(), BambaShape.from_hf(cfg)))
    assert sorted(name for name, _ in current) == sorted(state)
    for name, tensor in current:
        assert torch.equal(tensor, state[name]), name


def test_transformers_names_pass_through() -> None:
    cfg = config()
    state = BambaForCausalLM(cfg).state_dict()
    passed = dict(current_names(state.items(), BambaShape.from_hf(cfg)))
    assert passed.keys() == state.keys()
    assert all(passed[name] is tensor for name, tensor in state.items())


# loading into a model


class Fused(nn.Module):
    """Stands for vLLM's fused linear layers: loads each part into its rows, refuses another shape."""

    def __init__(self, rows: dict[object, int], columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((sum(rows.values()), columns), float("nan")), requires_grad=False)
        starts = {place: sum(list(rows.values())[:i]) for i, place in enumerate(rows)}

        def load(param: nn.Parameter, loaded: torch.Tensor, place: object) -> None:
            part = param.data[starts[place] : starts[place] + rows[place]]
            assert part.shape == loaded.shape
            part.copy_(loaded)

        self.weight.weight_loader = load


class Plain(nn.Module):
    def __init__(self, *size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full(size, float("nan")), requires_grad=False)


def modules(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


class StandIn(nn.Module):
    """The parameters of a Bamba under their names on one rank, without vLLM's engine around them."""

    def __init__(self, cfg: BambaConfig):
        super().__init__()
        hidden, inner, shape = cfg.hidden_size, cfg.intermediate_size, BambaShape.from_hf(cfg)
        self.model = nn.Module()
        self.model.embed_tokens = Plain(cfg.vocab_size, hidden)
        self.model.final_layernorm = Plain(hidden)
        self.model.layers = nn.ModuleList(
            self.layer(i, cfg, shape, hidden, inner) for i in range(cfg.num_hidden_layers)
        )
        if not cfg.tie_word_embeddings:
            self.lm_head = Plain(cfg.vocab_size, hidden)

    def layer(self, index: int, cfg: BambaConfig, shape: BambaShape, hidden: int, inner: int) -> nn.Module:
        layer = nn.Module()
        layer.input_layernorm, layer.pre_ff_layernorm = Plain(hidden), Plain(hidden)
        layer.feed_forward = modules(gate_up_proj=Fused({0: inner, 1: inner}, hidden), down_proj=Plain(hidden, inner))
        if index in shape.attention_layers:
            queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
            qkv = Fused({"q": queries, "k": keys, "v": keys}, hidden)
            layer.self_attn = modules(qkv_proj=qkv, o_proj=Plain(hidden, queries))
            return layer
        shard = whole(shape)
        layer.mamba = modules(
            in_proj=Plain(shape.mamba_intermediate + shape.conv_channels + shape.mamba_heads, hidden),
            conv1d=CausalConv1d(shard, shape.conv_width, bias=True),
            norm=GatedRMSNorm(shard, 1e-5),
            out_proj=Plain(hidden, shape.mamba_intermediate),
        )
        heads = (shape.mamba_heads,), [shard.head_rows]
        layer.mamba.A = sharded_parameter(*heads, torch.float32, convert=lambda log: -log.float().exp())
        layer.mamba.D, layer.mamba.dt_bias = sharded_parameter(*heads), sharded_parameter(*heads)
        return layer


def whole(shape: BambaShape) -> MixerShard:
    return MixerShard(shape.mamba_heads, shape.mamba_head_dim, shape.mamba_groups, shape.mamba_state)


def prepared(**changes: object) -> tuple[StandIn, BambaShape, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    cfg = config(**changes)
    state = {name: torch.randn_like(tensor) for name, tensor in BambaForCausalLM(cfg).state_dict().items()}
    return StandIn(cfg), BambaShape.from_hf(cfg), state


@pytest.mark.parametrize("names", ["transformers", "mamba_ssm"])
def test_every_weight_lands_in_its_place(names: str) -> None:
    model, shape, state = prepared()
    given = in_mamba_ssms_names(state) if names == "mamba_ssm" else state
    loaded = load_weights(model, shape, given.items())
    parameters = dict(model.named_parameters())
    assert loaded == parameters.keys()

    def of(layer: int, module: str) -> torch.Tensor:
        return state[f"model.layers.{layer}.{module}"]

    fused = {
        "model.layers.1.self_attn.qkv_proj.weight": [of(1, f"self_attn.{p}_proj.weight") for p in "qkv"],
        **{
            f"model.layers.{i}.feed_forward.gate_up_proj.weight": [
                of(i, "feed_forward.gate_proj.weight"),
                of(i, "feed_forward.up_proj.weight"),
            ]
            for i in range(3)
        },
    }
    for name, parameter in parameters.items():
        if name in fused:
            expected = torch.cat(fused[name])
        elif name.endswith(".A"):
            expected = -state[name.replace(".A", ".A_log")].exp()
        elif name.endswith("conv1d.weight"):
            expected = state[name][:, 0]
        else:
            expected = state[name]
        assert torch.equal(parameter, expected), name


def test_the_head_of_a_tied_model_is_not_left_over() -> None:
    model, shape, state = prepared(tie_word_embeddings=True)
    assert "lm_head.weight" in state
    load_weights(model, shape, state.items())
    model, shape, state = prepared(tie_word_embeddings=True)
    del state["lm_head.weight"]
    load_weights(model, shape, state.items())


def test_rotary_tables_of_old_checkpoints_are_ignored() -> None:
    model, shape, state = prepared()
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    load_weights(model, shape, state.items())


def gptq() -> QuantizationConfig:
    return AutoGPTQConfig.from_config({"bits": 4, "group_size": 32, "desc_act": False, "sym": True})


@pytest.mark.parametrize("name", ["{}_proj.output_scale", "{}_proj.{}_scale", "{}_scale", "{}_cache.scale"])
def test_scales_of_the_cache_are_found_by_each_of_their_names(name: str) -> None:
    model, shape, state = prepared()
    model.quant_config = Fp8Config()
    attention = "model.layers.1.self_attn"
    scales = {of: nn.Parameter(torch.tensor(-1.0), requires_grad=False) for of in "kv"}
    model.get_submodule(attention).attn = nn.ParameterDict({f"{of}_scale": scale for of, scale in scales.items()})
    state |= {f"{attention}.{name.format(of, of)}": torch.tensor(0.25 + (of == "v")) for of in "kv"}
    load_weights(model, shape, state.items())
    assert (scales["k"].item(), scales["v"].item()) == (0.25, 1.25)


@pytest.mark.parametrize("name", ["k_scale", "v_proj.v_scale", "attn.q_scale", "q_zero_point"])
def test_scales_of_a_cache_that_is_not_quantised_are_ignored(name: str) -> None:
    model, shape, state = prepared()
    for model.quant_config in (None, gptq(), Fp8Config()):
        load_weights(model, shape, (state | {f"model.layers.1.self_attn.{name}": torch.tensor(0.25)}).items())


def test_the_order_of_inputs_that_gptq_notes_is_ignored() -> None:
    model, shape, state = prepared()
    state["model.layers.0.mamba.in_proj.g_idx"] = torch.arange(16) // 8
    state["model.layers.1.self_attn.q_proj.g_idx"] = torch.arange(16) // 8
    model.quant_config = gptq()
    load_weights(model, shape, state.items())


@pytest.mark.parametrize("name", ["0.mamba.in_proj", "1.self_attn.k_proj", "1.feed_forward.up_proj"])
def test_a_bias_that_the_model_has_not_may_be_zero(name: str) -> None:
    model, shape, state = prepared()
    name = f"model.layers.{name}.bias"
    load_weights(model, shape, (state | {name: torch.zeros(8)}).items())
    with pytest.raises(ValueError, match=rf"Left over 1: {name}"):
        load_weights(model, shape, (state | {name: torch.eye(8)[3]}).items())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.final_layernorm.weight",
        "model.layers.0.mamba.A_log",
        "model.layers.2.mamba.conv1d.bias",
        "model.layers.0.mamba.in_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.feed_forward.up_proj.weight",
    ],
)
def test_a_missing_weight_is_named_as_the_checkpoint_would(name: str) -> None:
    model, shape, state = prepared()
    del state[name]
    with pytest.raises(ValueError, match=rf"Missing 1: {name}\. Is every shard") as error:
        load_weights(model, shape, state.items())
    assert "Left over" not in str(error.value)


def test_a_model_that_is_complete_takes_some_weights_but_none_left_over() -> None:
    model, shape, state = prepared()
    load_weights(model, shape, state.items())
    name = "model.final_layernorm.weight"
    assert load_weights(model, shape, [(name, 3 * state[name])], partial=True) == {name}
    assert torch.equal(dict(model.named_parameters())[name], 3 * state[name])
    with pytest.raises(ValueError, match=r"Left over 1: model\.other"):
        load_weights(model, shape, [("model.other", torch.ones(1))], partial=True)


@pytest.mark.parametrize("method", [None, "no_post_processing"])
def test_a_classifier_that_vllm_makes_of_the_head_is_not_missing(method: str | None) -> None:
    model, shape, state = prepared()
    model.score, model.config = Plain(2, shape.hidden_size), SimpleNamespace(method=method)
    if method:
        assert "score.weight" not in load_weights(model, shape, state.items())
        return
    with pytest.raises(ValueError, match=r"Missing 1: score\.weight"):
        load_weights(model, shape, state.items())


def test_weights_left_over_and_missing_are_counted_and_named() -> None:
    model, shape, state = prepared(mamba_conv_bias=True)
    extra = {f"model.layers.0.mamba.extra{i}": torch.ones(1) for i in range(10)}
    del state["model.layers.0.mamba.D"]
    with pytest.raises(ValueError, match="does not match the model") as error:
        load_weights(model, shape, (state | extra).items())
    message = str(error.value)
    assert "Missing 1: model.layers.0.mamba.D." in message
    assert "Left over 10: model.layers.0.mamba.extra0, " in message
    assert "extra7 and 2 more." in message


def test_weights_of_a_layer_that_the_model_has_not_are_left_over() -> None:
    model, shape, state = prepared()
    state["model.layers.3.input_layernorm.weight"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"Left over 1: model\.layers\.3\.input_layernorm\.weight"):
        load_weights(model, shape, state.items())


@pytest.mark.parametrize("rows", [-1, 1], ids=["too_few_rows", "too_many_rows"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mamba.A_log",
        "model.layers.0.mamba.D",
        "model.layers.0.mamba.conv1d.weight",
        "model.layers.0.mamba.conv1d.bias",
        "model.layers.0.mamba.norm.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.feed_forward.gate_proj.weight",
    ],
)
def test_a_weight_of_another_shape_is_refused_by_name(name: str, rows: int) -> None:
    model, shape, state = prepared()
    whole = state[name]
    state[name] = whole[:-1] if rows < 0 else torch.cat([whole, whole[:1]])
    with pytest.raises(ValueError, match=rf"{name} of shape \({len(whole) + rows}\D") as error:
        load_weights(model, shape, state.items())
    assert "does not fit" in str(error.value)


def test_integers_of_another_shape_are_refused_by_name() -> None:
    model, shape, state = prepared()
    name = "model.layers.0.mamba.in_proj.weight"

    def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:  # as vLLM's loaders of quantised weights
        parameter.data.copy_(loaded.narrow(0, 0, len(parameter)))

    dict(model.named_parameters())[name].weight_loader = load
    with pytest.raises(ValueError, match=rf"{name} of shape \(7, 7\) does not fit"):
        load_weights(model, shape, (state | {name: torch.ones(7, 7, dtype=torch.int8)}).items())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB."), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), True),
        (NotImplementedError('"copy_kernel" not implemented for this type and size'), True),
    ],
    ids=["memory of a GPU", "memory of a CPU", "another class of errors"],
)
def test_what_is_not_the_checkpoints_fault_keeps_its_type(error: RuntimeError, says: bool) -> None:
    model, shape, state = prepared()
    name = "model.layers.0.mamba.out_proj.weight"

    def fail(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        raise error

    dict(model.named_parameters())[name].weight_loader = fail
    with pytest.raises(type(error)) as raised:
        load_weights(model, shape, state.items())
    assert raised.value is error
    assert getattr(error, "__notes__", []) == [f"while loading checkpoint tensor {name} of shape (16, 32)"] * says


@pytest.mark.parametrize(
    "fit",
    [
        lambda rows, loaded: rows.copy_(loaded),
        lambda rows, loaded: rows.copy_(loaded.narrow(0, 0, len(rows))),
        lambda rows, loaded: rows.copy_(loaded.view(rows.shape)),
        lambda rows, loaded: rows.copy_(loaded.expand(rows.shape)),
        lambda rows, loaded: rows.copy_(torch.cat(loaded.split([len(rows), len(loaded)]))),
        lambda rows, loaded: rows.copy_(torch.cat([loaded, rows])),
        lambda rows, loaded: rows.copy_(torch.stack([loaded, rows])[0]),
        lambda rows, loaded: rows.copy_(loaded @ rows),
    ],
    ids=["copy", "narrow", "view", "expand", "split", "cat", "stack", "product"],
)
def test_whatever_torch_calls_a_misfit_it_is_the_checkpoints(fit: object) -> None:
    """Loaders of quantised weights, whose shapes nobody else checks, leave that to torch."""
    model, shape, state = prepared()
    name = "model.layers.0.mamba.out_proj.weight"
    dict(model.named_parameters())[name].weight_loader = lambda parameter, loaded: fit(parameter.data, loaded)
    with pytest.raises(ValueError, match=rf"{name} of shape \(7, 7\) does not fit the model that config\.json"):
        load_weights(model, shape, (state | {name: torch.ones(7, 7, dtype=torch.int8)}).items())


def test_a_convolution_of_another_width_is_refused() -> None:
    model, shape, state = prepared()
    name = "model.layers.0.mamba.conv1d.weight"
    state[name] = state[name][..., 1:]
    with pytest.raises(ValueError, match=rf"{name} .*does not fit"):
        load_weights(model, shape, state.items())


# copies of B and C on the way into in_proj


def copies(groups: int, ranks: int) -> SimpleNamespace:
    return SimpleNamespace(shard=MixerShard(heads=4, head_dim=8, groups=groups, state=16, size=ranks))


@pytest.mark.parametrize(("groups", "ranks"), [(1, 1), (1, 2), (1, 4), (2, 4), (2, 2)])
def test_weights_biases_and_block_scales_repeat_the_same_rows(groups: int, ranks: int) -> None:
    layer, times = copies(groups, ranks), max(1, ranks // groups)
    gate, x, *bc, dt = (
        torch.arange(32),
        100 + torch.arange(32),
        *(200 + torch.arange(2 * groups * 16)).split(16),
        torch.tensor([900, 901, 902, 903]),
    )
    bias = torch.cat([gate, x, *bc, dt])
    repeated = torch.cat([gate, x, *(group for group in bc for _ in range(times)), dt])
    assert torch.equal(InProjectionLinear.with_copies(layer, bias, 0), repeated)
    weight = torch.stack([bias, 2 * bias], 1)
    assert torch.equal(InProjectionLinear.with_copies(layer, weight, 0), torch.stack([repeated, 2 * repeated], 1))
    assert torch.equal(InProjectionLinear.with_copies(layer, weight.T, 1), torch.stack([repeated, 2 * repeated]))
    scales, repeated_scales = bias[::4], repeated[::4]  # one for each four rows
    assert torch.equal(InProjectionLinear.with_copies(layer, scales, 0), repeated_scales)


def test_block_scales_that_cross_a_border_are_refused() -> None:
    layer = copies(groups=1, ranks=2)  # rows 32 | 32 | 16 | 16 | 4
    with pytest.raises(ValueError, match="blocks of 10 rows"):
        InProjectionLinear.with_copies(layer, torch.zeros(10), 0)


@pytest.mark.parametrize("rows", [101, 164], ids=["one_more", "a_group_more"])
def test_an_in_proj_with_more_rows_than_the_model_is_refused(rows: int) -> None:
    """Else a checkpoint whose config understates the state or the groups would load, cut short, without a word."""
    with pytest.raises(ValueError, match="in_proj"):
        InProjectionLinear.with_copies(copies(groups=1, ranks=2), torch.zeros(rows, 2), 0)


# files, before anything is loaded


def save(folder: pathlib.Path, shards: int = 1) -> list[pathlib.Path]:
    """A checkpoint of a few tensors in one file, or in several with an index."""
    files, index = [], {}
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(
            {f"w{i}": torch.ones(3, 4), f"b{i}": torch.ones(4, dtype=torch.bfloat16)}, folder / name, {"format": "pt"}
        )
        files.append(folder / name)
        index |= {f"w{i}": name, f"b{i}": name}
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


@pytest.mark.parametrize("shards", [1, 3])
def test_whole_files_pass(shards: int, tmp_path: pathlib.Path) -> None:
    save(tmp_path, shards)
    check_files(str(tmp_path), "auto")
    check_files(str(tmp_path), "safetensors")


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    gone = save(tmp_path, 3)[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"missing: {gone.name}"):
        check_files(str(tmp_path), "auto")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "keep", [-1, -20, 40, 8, 5, 0], ids=["a_byte", "a_tensor", "header", "header_gone", "length", "all"]
)
def test_a_truncated_file_is_named(keep: int, shards: int, tmp_path: pathlib.Path) -> None:
    cut = save(tmp_path, shards)[-1]
    cut.write_bytes(cut.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{cut.name}.*[Ff]etch it again"):
        check_files(str(tmp_path), "auto")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: pathlib.Path) -> None:
    (file,) = save(tmp_path)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=file.name):
        check_files(str(tmp_path), "auto")


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>" * 10,
        struct.pack("<Q", 12) + b"\xff\xfe not json" + bytes(40),
        struct.pack("<Q", 2) + b"[]" + bytes(40),
        struct.pack("<Q", 14) + b'{"w": "wrong"}' + bytes(40),
        struct.pack("<Q", 1 << 62) + bytes(40),
    ],
    ids=["html", "not_text", "a_list", "no_offsets", "absurd_length"],
)
def test_a_file_whose_header_is_garbage_is_named(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors.*[Ff]etch it again"):
        check_files(str(tmp_path), "auto")


def test_an_index_that_is_cut_short_is_named(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-5])
    with pytest.raises(ValueError, match=index.name):
        check_files(str(tmp_path), "auto")


def test_files_that_vllm_will_not_read_are_not_checked(tmp_path: pathlib.Path) -> None:
    """Dummy weights need no files, names on the hub have none here, and an index says which of a folder's count."""
    save(tmp_path, 2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"cut")
    check_files(str(tmp_path), "auto")
    for file in tmp_path.glob("model-*"):
        file.write_bytes(b"cut")
    check_files(str(tmp_path), "dummy")
    check_files("ibm-ai-platform/no-such-folder", "auto")
