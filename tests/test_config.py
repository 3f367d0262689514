"""What the config says is honoured or refused by name; Transformers' own classes are the truth."""

import dataclasses
import logging
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, BambaConfig
from transformers.models.bamba import modeling_bamba
from vllm.config import CUDAGraphMode
from vllm.config.mamba import MambaBackendEnum

from vllm_bamba import compat
from vllm_bamba.config import NO_TIME_STEP_LIMIT, BambaServingConfig, BambaShape
from vllm_bamba.step_options import StepOptions, check_step

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "attn_layer_indices": [1, 3],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "max_position_embeddings": 1024,
}

# fields that serving does not read, and why
IRRELEVANT = {
    "initializer_range": "of training",
    "z_loss_coefficient": "of training",
    "attention_dropout": "of training",
    "use_cache": "vLLM always keeps states and keys",
    "num_logits_to_keep": "vLLM asks for the logits that it wants",
    "pad_token_id": "vLLM packs, it does not pad",
    "bos_token_id": "the tokenizer's and the generation config's affair",
    "eos_token_id": "the tokenizer's and the generation config's affair",
}

# another value of every other field, and what a small model needs so that only this field is at odds with the rest
CHANGED = {
    "vocab_size": 640,
    "tie_word_embeddings": True,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 77,
    "attn_layer_indices": [2],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 4,
    "mamba_chunk_size": 32,
    "mamba_conv_bias": False,
    "mamba_proj_bias": True,
    "time_step_limit": (0.1, 0.5),
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attention_bias": True,
    "mlp_bias": True,
}


def raw(**changes: object) -> SimpleNamespace:
    """A small Bamba's config as plain attributes, so that nothing but our own checks looks at the changes."""
    values = dict(vars(BambaConfig(**SMALL))) | {"model_type": "bamba"} | changes
    return SimpleNamespace(**values)


def outcome(**changes: object) -> BambaShape | str:
    try:
        return BambaShape.from_hf(raw(**changes))
    except ValueError as error:
        return str(error)


def own_fields() -> set[str]:
    """The fields that BambaConfig itself declares."""
    return {f.name for f in dataclasses.fields(BambaConfig)} & set(BambaConfig.__annotations__)


def test_every_field_of_transformers_config_is_read_or_listed_as_irrelevant() -> None:
    """A field that a new Transformers adds fails here until someone decides what it means."""
    read = set()

    class Spy:
        def __init__(self) -> None:
            self.config = raw()

        def __getattr__(self, name: str) -> object:
            read.add(name)
            return getattr(self.config, name)

    BambaShape.from_hf(Spy())
    assert own_fields() - read == set(IRRELEVANT)
    assert own_fields() & read == set(CHANGED)


@pytest.mark.parametrize("field", CHANGED)
def test_every_other_field_changes_the_model_or_is_refused_by_name(field: str) -> None:
    before, after = outcome(), outcome(**{field: CHANGED[field]})
    assert isinstance(before, BambaShape)
    assert after != before
    assert isinstance(after, BambaShape) or field in after


def test_defaults_are_transformers() -> None:
    shape = BambaShape.from_hf(BambaConfig())
    default = {f.name: f.default for f in dataclasses.fields(BambaConfig)}
    renamed = {
        "num_hidden_layers": "num_layers",
        "mamba_n_heads": "mamba_heads",
        "mamba_n_groups": "mamba_groups",
        "mamba_d_state": "mamba_state",
        "mamba_d_conv": "conv_width",
        "mamba_chunk_size": "chunk_size",
    }
    derived = {"mamba_d_head", "mamba_expand", "hidden_act", "attn_layer_indices", "rope_parameters"}
    for field in set(CHANGED) - derived:
        assert getattr(shape, renamed.get(field, field)) == default[field], field
    assert shape.attention_layers == frozenset()
    assert shape.head_dim == default["hidden_size"] // default["num_attention_heads"]
    assert shape.rotary_dim == shape.head_dim // 2
    assert shape.mamba_head_dim == default["mamba_expand"] * default["hidden_size"] // default["mamba_n_heads"]
    assert shape.rope_parameters["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"mamba_n_groups": 2}, {"num_attention_heads": 2, "mamba_d_conv": 2}, {"mamba_d_head": "auto"}],
    ids=str,
)
def test_sizes_are_those_of_transformers_modules(changes: dict[str, object]) -> None:
    config = BambaConfig(**(SMALL | changes))
    shape = BambaShape.from_hf(config)
    mixer, attention = modeling_bamba.BambaMixer(config, 0), modeling_bamba.BambaAttention(config, 1)
    assert mixer.conv1d.weight.shape == (shape.conv_channels, 1, shape.conv_width)
    assert mixer.in_proj.out_features == shape.mamba_intermediate + shape.conv_channels + shape.mamba_heads
    assert mixer.head_dim == shape.mamba_head_dim
    assert attention.q_proj.out_features == shape.num_attention_heads * shape.head_dim
    assert attention.k_proj.out_features == shape.num_key_value_heads * shape.head_dim
    assert 2 * len(modeling_bamba.BambaRotaryEmbedding(config).inv_freq) == shape.rotary_dim


def test_a_config_reads_the_same_from_its_file(tmp_path: pathlib.Path) -> None:
    """Infinity and the automatic head width survive JSON."""
    config = BambaConfig(**(SMALL | {"mamba_d_head": "auto", "time_step_limit": (0.0, math.inf)}))
    config.save_pretrained(tmp_path)
    shape = BambaShape.from_hf(AutoConfig.from_pretrained(tmp_path))
    assert shape == BambaShape.from_hf(config)
    assert shape.time_step_limit == NO_TIME_STEP_LIMIT


def test_an_automatic_head_width_shares_the_inner_channels() -> None:
    assert BambaShape.from_hf(raw(mamba_d_head="auto", mamba_n_heads=8)).mamba_head_dim == 2 * 64 // 8


@pytest.mark.parametrize(
    ("rotary", "dim"),
    [({}, 8), ({"attn_rotary_emb": None}, 8), ({"attn_rotary_emb": 4}, 4), ({"attn_rotary_emb": 16}, 16)],
    ids=str,
)
def test_half_of_a_head_is_rotated_unless_the_config_says_otherwise(rotary: dict[str, object], dim: int) -> None:
    assert "attn_rotary_emb" not in vars(raw())
    assert BambaShape.from_hf(raw(**rotary)).rotary_dim == dim


def test_attention_rotates_as_many_channels_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 of 55: as a fraction they would come back as 27."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_bamba import model

    assert int(55 * (28 / 55)) == 27
    for layer in ("QKVParallelLinear", "RowParallelLinear", "SharedAttention"):
        monkeypatch.setattr(model, layer, lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: 1)
    shape = dataclasses.replace(BambaShape.from_hf(raw()), head_dim=55, rotary_dim=28)
    with set_current_vllm_config(VllmConfig()):
        attention = model.BambaAttention(shape, VllmConfig(), "attention")
    assert attention.rotary_emb.rotary_dim == 28


def test_the_head_is_quantised_like_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_bamba import model

    made: dict[str, object] = {}
    monkeypatch.setattr(model, "BambaModel", lambda **_: SimpleNamespace(make_empty_intermediate_tensors=None))
    monkeypatch.setattr(model, "ParallelLMHead", lambda *_, **options: made.update(options))
    monkeypatch.setattr(model, "LogitsProcessor", lambda *_: None)
    monkeypatch.setattr(model, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    config = engine()
    config.quant_config = object()
    model.BambaForCausalLM(vllm_config=config)
    assert made == {"quant_config": config.quant_config, "prefix": "lm_head"}


def test_rotary_fraction_is_a_half_even_where_rope_parameters_do_not_say() -> None:
    assert BambaShape.from_hf(raw(rope_parameters=None)).rotary_dim == 8
    assert BambaShape.from_hf(raw(rope_parameters={"rope_theta": 500.0})).rotary_dim == 8


@pytest.mark.parametrize("absent", [None, []], ids=str)
def test_a_model_without_attention_layers_is_possible(absent: object) -> None:
    assert BambaShape.from_hf(raw(attn_layer_indices=absent)).attention_layers == frozenset()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("vocab_size", {"vocab_size": 0}),
        ("hidden_size", {"hidden_size": "64"}),
        ("intermediate_size", {"intermediate_size": None}),
        ("num_hidden_layers", {"num_hidden_layers": -1}),
        ("max_position_embeddings", {"max_position_embeddings": 0}),
        ("num_attention_heads", {"num_attention_heads": 3}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("num_key_value_heads", {"num_key_value_heads": -2}),
        ("attn_layer_indices", {"attn_layer_indices": [1, 4]}),
        ("attn_layer_indices", {"attn_layer_indices": [-1]}),
        ("hidden_act", {"hidden_act": "relu"}),
        ("mamba_n_heads", {"mamba_n_heads": None}),
        ("mamba_n_heads", {"mamba_n_heads": 3, "mamba_d_head": "auto"}),
        ("mamba_d_head", {"mamba_d_head": 16}),
        ("mamba_d_head", {"mamba_d_head": "large"}),
        ("mamba_expand", {"mamba_expand": 3}),
        ("mamba_expand", {"mamba_expand": None}),
        ("mamba_expand", {"mamba_expand": None, "mamba_d_head": "auto"}),
        ("mamba_n_heads", {"mamba_n_heads": 0, "mamba_d_head": "auto"}),
        ("rms_norm_eps", {"rms_norm_eps": None}),
        ("rms_norm_eps", {"rms_norm_eps": 0.0}),
        ("mamba_n_groups", {"mamba_n_groups": 3}),
        ("mamba_d_state", {"mamba_d_state": 0}),
        ("mamba_d_conv", {"mamba_d_conv": 1}),
        ("mamba_d_conv", {"mamba_d_conv": 5}),
        ("mamba_chunk_size", {"mamba_chunk_size": 24}),
        ("time_step_limit", {"time_step_limit": (0.5, 0.1)}),
        ("time_step_limit", {"time_step_limit": (-0.1, 0.1)}),
        ("time_step_limit", {"time_step_limit": (0.1, math.nan)}),
        ("time_step_limit", {"time_step_limit": (0.1,)}),
        ("rope_type", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("attn_rotary_emb", {"attn_rotary_emb": 7}),
        ("attn_rotary_emb", {"attn_rotary_emb": 0}),
        ("attn_rotary_emb", {"attn_rotary_emb": 18}),
        ("attn_rotary_emb", {"attn_rotary_emb": "half"}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.0}}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 1.5}}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": math.nan}}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": "half"}}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.45}}),  # 7 of 16 channels
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        BambaShape.from_hf(raw(**changes))


@pytest.mark.parametrize("other", ["mamba2", "granitemoehybrid", None], ids=str)
def test_a_config_of_another_model_is_refused(other: str | None) -> None:
    with pytest.raises(ValueError, match="model_type"):
        BambaShape.from_hf(raw(model_type=other))


def engine(**changes: object) -> SimpleNamespace:
    """As much of vLLM's config as the hook reads."""
    values = {
        "hf_config": raw(),
        "model": "a/name-on-the-hub",
        "tensor": 1,
        "stages": 1,
        "replay": False,
        "drafts": 0,
        "caching": False,
        "lora": None,
        "state_dtype": "auto",
        "cache_dtype": "auto",
        "quantization": None,
        "connector": None,
        "offloading": None,
        "dtype": torch.bfloat16,
        "scheduler": None,
        "inductor": {},
        "prefetched": 0,
        "on_host": 0,
        "offload_backend": "auto",
        "mamba_backend": "TRITON",
        "rounds_at_random": False,
    } | changes
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=values["hf_config"],
            model=values["model"],
            quantization=values["quantization"],
            dtype=values["dtype"],
            runner_type="generate",
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=values["tensor"],
            pipeline_parallel_size=values["stages"],
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(
            use_replayssm=values["replay"],
            mamba_ssm_cache_dtype=values["state_dtype"],
            mamba_cache_dtype=values["cache_dtype"],
            enable_prefix_caching=values["caching"],
            kv_offloading_size=values["offloading"],
            prefix_cache_retention_interval=None,
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=values["scheduler"]),
        offload_config=SimpleNamespace(
            offload_backend=values["offload_backend"],
            prefetch=SimpleNamespace(offload_group_size=values["prefetched"]),
            uva=SimpleNamespace(cpu_offload_gb=values["on_host"]),
        ),
        compilation_config=SimpleNamespace(inductor_compile_config=values["inductor"]),
        mamba_config=SimpleNamespace(
            backend=MambaBackendEnum[values["mamba_backend"]], enable_stochastic_rounding=values["rounds_at_random"]
        ),
        additional_config={},
        speculative_config=object() if values["drafts"] else None,
        num_speculative_tokens=values["drafts"],
        lora_config=values["lora"],
        kv_transfer_config=values["connector"],
        kv_events_config=None,
    )


def test_the_hook_accepts_a_good_model_and_changes_nothing_that_the_user_chose() -> None:
    config = engine(tensor=2, state_dtype="bfloat16", scheduler="some.Scheduler", inductor={"shape_padding": True})
    before = repr(config)
    BambaServingConfig.verify_and_update_config(config)
    assert repr(config) == before


def test_the_hook_checks_the_model_the_parallelism_the_options_and_the_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    for message, changes in {
        "mamba_d_conv": {"hf_config": raw(mamba_d_conv=9)},
        "tensor_parallel_size = 3": {"tensor": 3},
        "--use-replayssm": {"replay": True},
        "--offload-group-size": {"prefetched": 2},
        "--fully-sharded-loras": {"tensor": 2, "lora": SimpleNamespace(fully_sharded_loras=True)},
        "model.safetensors": {"model": str(tmp_path)},
    }.items():
        with pytest.raises(ValueError, match=message):
            BambaServingConfig.verify_and_update_config(engine(**changes))


@pytest.mark.parametrize(("cpu", "dtype"), [(True, "float32"), (False, "auto")], ids=["cpu", "gpu"])
def test_state_is_kept_in_fp32_where_the_step_does_not_round(
    cpu: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(compat.current_platform), "is_cpu", lambda self: cpu)
    config = engine()
    compat.choose_state_dtype(config)
    assert config.cache_config.mamba_ssm_cache_dtype == dtype


@pytest.mark.parametrize(("chosen", "apart"), [({}, 580), ({"shape_padding": True}, 584)])
def test_rows_of_products_stay_where_the_next_piece_looks_for_them(
    chosen: dict[str, object], apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's padding, which it leaves to GPUs, does what `keep_strides` is there for: the second case."""
    from torch._inductor import standalone_compile
    from torch._inductor.fx_passes import pad_mm

    config = engine(inductor=dict(chosen))
    compat.keep_strides(config)
    monkeypatch.setattr(pad_mm, "check_device", lambda *of: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda: True)
    options = config.compilation_config.inductor_compile_config | {
        "force_shape_pad": True,
        "force_disable_caches": True,
    }

    def piece(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        return standalone_compile(graph, inputs, dynamic_shapes="from_graph", options={"config_patches": options})

    x, weight = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(580, 16, dtype=torch.bfloat16)
    torch._dynamo.reset()
    product = torch.compile(lambda x: (x @ weight.t(),), backend=piece, fullgraph=True)(x)[0]
    assert product.stride() == (apart, 1)


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
def test_speculation_is_refused_without_a_gpu_only(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(compat.current_platform), "is_cpu", lambda self: cpu)
    config = engine(drafts=2)
    shape = BambaShape.from_hf(config.model_config.hf_config)
    if cpu:
        with pytest.raises(ValueError, match="--speculative-config"):
            check_step(config, shape)
    else:
        check_step(config, shape)


@pytest.mark.parametrize(
    ("drafts", "replay", "caching", "message"),
    [
        (3, 8, False, None),
        (7, 16, False, None),
        (15, 32, False, None),
        (4, 8, False, r"4 drafted tokens do not fit bamba_replay 8 \(16 and 32 would do\)"),
        (1, 0, False, r"1 drafted tokens do not fit bamba_replay 0 \(8 and 16 and 32 would do\)"),
        (16, 32, False, r"16 drafted tokens do not fit bamba_replay 32 \(none would do\)"),
        (3, 8, True, "states must not be cached .--no-enable-prefix-caching"),
    ],
)
def test_drafts_that_the_fused_step_cannot_take_back_are_refused(
    drafts: int, replay: int, caching: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = engine(drafts=drafts, caching=caching)
    config.additional_config = {"bamba_fused_step": True, "bamba_replay": replay}
    shape = BambaShape.from_hf(config.model_config.hf_config)
    if message is None:
        check_step(config, shape)
    else:
        with pytest.raises(ValueError, match=message):
            check_step(config, shape)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"mamba_backend": "FLASHINFER"}, "--mamba-backend"), ({"rounds_at_random": True}, "stochastic-rounding")],
)
def test_the_fused_step_refuses_what_is_asked_of_vllms_kernels(
    changes: dict[str, object], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = engine(**changes)
    shape = BambaShape.from_hf(config.model_config.hf_config)
    check_step(config, shape)
    config.additional_config = {"bamba_fused_step": True}
    with pytest.raises(ValueError, match=f"bamba_fused_step cannot be used here: .*{flag}.* leave out"):
        check_step(config, shape)


@pytest.mark.parametrize("fused", [False, True], ids=["vllm_step", "fused_step"])
@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"mode": CUDAGraphMode.FULL_AND_PIECEWISE}, True),
        ({"mode": CUDAGraphMode.FULL_DECODE_ONLY}, True),
        ({"mode": CUDAGraphMode.PIECEWISE}, False),
        ({"eager": True}, False),
        ({"v2": True}, False),
        ({"drafts": 0}, False),
    ],
    ids=str,
)
def test_drafts_in_full_graphs_of_model_runner_v1_are_refused(
    changes: dict[str, object], refused: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes prompts of as many tokens for decodes, in graphs whose slots were not brought up to date."""
    given = {"mode": None, "eager": False, "v2": False, "drafts": 3} | changes
    for name, holds in {"is_cuda": True, "is_cpu": False}.items():
        monkeypatch.setattr(type(compat.current_platform), name, lambda self, holds=holds: holds)
    config = engine(drafts=given["drafts"])
    config.additional_config = {"bamba_fused_step": fused}
    config.compilation_config.cudagraph_mode = given["mode"]
    config.model_config.enforce_eager, config.use_v2_model_runner = given["eager"], given["v2"]
    shape = BambaShape.from_hf(config.model_config.hf_config)
    if refused:
        with pytest.raises(ValueError, match=r"Model Runner V1.*PIECEWISE.*--enforce-eager"):
            check_step(config, shape)
    else:
        check_step(config, shape)


@pytest.mark.parametrize(
    ("why", "capability", "changes"),
    [
        ("", (9, 0), {}),
        ("another GPU", (8, 0), {}),
        ("a CPU", None, {}),
        ("quantised", (9, 0), {"quantization": "fp8"}),
        ("", (9, 0), {"caching": True}),
        ("", (9, 0), {"drafts": 2}),
        ("drafts and prefix caching", (9, 0), {"drafts": 2, "caching": True}),
        ("more drafts than a ring takes back", (9, 0), {"drafts": 8}),
        ("blocks go to other engines", (9, 0), {"connector": object()}),
        ("blocks go to the host", (9, 0), {"offloading": 1.0}),
        ("fp16", (9, 0), {"dtype": torch.float16}),
        ("FlashInfer's kernels", (9, 0), {"mamba_backend": "FLASHINFER"}),
        ("vLLM's rounding", (9, 0), {"rounds_at_random": True}),
        ("a head of 24", (9, 0), {"hf_config": raw(mamba_d_head=24, mamba_n_heads=16, hidden_size=192)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_fused_step_is_the_default_where_it_was_shown(
    why: str, capability: tuple[int, int] | None, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = type(compat.current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: capability is not None)
    monkeypatch.setattr(platform, "is_device_capability", classmethod(lambda cls, asked: asked == capability))
    config = engine(**changes)
    shape = BambaShape.from_hf(config.model_config.hf_config)
    assert StepOptions.of(config, shape).fused is not bool(why)
    config.additional_config = {"bamba_fused_step": False}
    assert not StepOptions.of(config, shape).fused
    if "drafts" in why and not changes.get("caching"):
        config.additional_config = {"bamba_replay": 32}
        assert StepOptions.of(config, shape).fused, "a longer ring takes them back"


@pytest.mark.parametrize(
    ("expected", "given", "changes"),
    [
        (torch.int8, {}, {}),
        (torch.int8, {"bamba_fused_step": True}, {}),
        (torch.float8_e4m3fn, {"bamba_state_dtype": "fp8"}, {}),
        (None, {}, {"state_dtype": "bfloat16"}),
        (None, {}, {"cache_dtype": "float32"}),
        (torch.int8, {"bamba_state_dtype": "int8"}, {"state_dtype": "bfloat16"}),
        (None, {"bamba_fused_step": False}, {}),
        (None, {"bamba_fused_step": True}, {"quantization": "fp8"}),
    ],
    ids=str,
)
def test_states_are_in_int8_where_the_fused_step_is_the_default_and_nobody_chose(
    expected: torch.dtype | None,
    given: dict[str, object],
    changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    platform = type(compat.current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    monkeypatch.setattr(platform, "is_device_capability", classmethod(lambda cls, asked: True))
    monkeypatch.setattr(platform, "has_device_capability", classmethod(lambda cls, asked: True))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = engine(**changes)
    config.additional_config = given
    shape = BambaShape.from_hf(config.model_config.hf_config)
    assert StepOptions.of(config, shape).eight_bits is expected
    chosen = expected is not None and "bamba_state_dtype" not in given
    with caplog.at_level("INFO", "vllm.vllm_bamba"):
        check_step(config, shape)
    assert ("int8" in caplog.text) is chosen, "what nobody chose is said"
