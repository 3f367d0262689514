"""From a checkpoint's names to the model's parameters, with nothing missing and nothing left over."""

import json
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, maybe_remap_kv_scale_name
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_bamba.compat import in_vllms_names
from vllm_bamba.config import BambaShape

Weights = Iterable[tuple[str, torch.Tensor]]

# checkpoint module -> fused module, and its place there
STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one parameter where they are tied
RENAMED = {"A_log": "A"}  # the parameter holds -exp(A_log)
OPTIONAL = (  # vLLM has defaults for these
    *(f".{of}_{what}" for of in ("q", "k", "v") for what in ("scale", "zero_point")),
    ".prob_scale",
    ".input_scale_ub",
)

# mamba_ssm's own names of modules, as Transformers' conversion script reads them
ORIGINAL_TOP = {"backbone": "model", "embedding": "embed_tokens", "norm_f": "final_layernorm"}
ORIGINAL_IN_LAYER = {"norm": "input_layernorm", "norm2": "pre_ff_layernorm", "mlp": "feed_forward", "fc2": "down_proj"}


def load_weights(model: nn.Module, shape: BambaShape, weights: Weights, partial: bool = False) -> set[str]:
    """Load `weights` into this rank's part of `model`.

    Args:
        model: a `BambaForCausalLM`.
        shape: what its config says.
        weights: names and tensors of a checkpoint, Transformers' or mamba_ssm's.
        partial: whether parameters may be missing, as when weights of a model that has all are brought one by one.

    Returns:
        Names of the parameters that were loaded.

    Raises:
        ValueError: a tensor does not fit its parameter, is left over, or is missing; the message lists the names.
    """
    # without what vLLM's LoRA layers put into the names of those that they wrap
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    shapes = checkpoint_shapes(shape)
    loaded: set[tuple[str, str | int | None]] = set()
    left_over = []
    for name, tensor in current_names(in_vllms_names(weights, getattr(model, "quant_config", None)), shape):
        if _belongs_elsewhere(model, shape, name):
            continue
        if tensor.is_floating_point() and tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
            raise ValueError(_misfit(name, tensor, f"expected {shapes[name]}"))
        target, place = _target(name, parameters)
        if target is None:
            continue
        if target not in parameters:
            if not name.endswith(".bias") or tensor.any():  # GPTQ's exporters write zeros where there is no bias
                left_over.append(name)
            continue
        _load(name, parameters[target], place, tensor)
        loaded.add((target, place))
        if shape.tie_word_embeddings and target == EMBEDDING and HEAD in parameters:  # two while vLLM reloads weights
            _load(name, parameters[HEAD], place, tensor)
            loaded.add((HEAD, place))

    config = getattr(model, "config", None)
    made = ("score.",) if getattr(config, "method", None) else ()  # a classifier that vLLM makes of lm_head
    missing = [
        _checkpoint_name(name, place)
        for name in parameters
        for place in _places(name)
        if not (partial or (name, place) in loaded or name.endswith(OPTIONAL) or name.startswith(made))
    ]
    if missing or left_over:
        raise ValueError(_mismatch(sorted(missing), sorted(left_over)))
    return {target for target, _ in loaded}


def checkpoint_shapes(shape: BambaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of an unquantised checkpoint, in Transformers' names."""
    hidden, inner, conv = shape.hidden_size, shape.mamba_intermediate, shape.conv_channels
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab_size, hidden),
        "model.final_layernorm.weight": (hidden,),
        HEAD: (shape.vocab_size, hidden),
    }

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.pre_ff_layernorm.weight"] = (hidden,)
        linear(f"{layer}.feed_forward.gate_proj", shape.intermediate_size, hidden, shape.mlp_bias)
        linear(f"{layer}.feed_forward.up_proj", shape.intermediate_size, hidden, shape.mlp_bias)
        linear(f"{layer}.feed_forward.down_proj", hidden, shape.intermediate_size, shape.mlp_bias)
        if index in shape.attention_layers:
            linear(f"{layer}.self_attn.q_proj", queries, hidden, shape.attention_bias)
            linear(f"{layer}.self_attn.k_proj", keys, hidden, shape.attention_bias)
            linear(f"{layer}.self_attn.v_proj", keys, hidden, shape.attention_bias)
            linear(f"{layer}.self_attn.o_proj", hidden, queries, shape.attention_bias)
            continue
        linear(f"{layer}.mamba.in_proj", inner + conv + shape.mamba_heads, hidden, shape.mamba_proj_bias)
        linear(f"{layer}.mamba.out_proj", hidden, inner, shape.mamba_proj_bias)
        shapes[f"{layer}.mamba.conv1d.weight"] = (conv, 1, shape.conv_width)
        if shape.mamba_conv_bias:
            shapes[f"{layer}.mamba.conv1d.bias"] = (conv,)
        shapes[f"{layer}.mamba.norm.weight"] = (inner,)
        for name in ("A_log", "D", "dt_bias"):
            shapes[f"{layer}.mamba.{name}"] = (shape.mamba_heads,)
    return shapes


def current_names(weights: Weights, shape: BambaShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass Transformers' names through; give mamba_ssm's original names, and their stacked tensors, Transformers'."""
    for name, tensor in weights:
        parts = name.split(".")
        if parts[0] != "backbone":
            yield name, tensor
            continue
        top = [ORIGINAL_TOP.get(part, part) for part in parts[:2]]
        if parts[1] != "layers":
            yield ".".join(top + parts[2:]), tensor
            continue
        layer = [*top, parts[2]]
        module, *rest = parts[3:]
        if module == "mixer" and int(parts[2]) in shape.attention_layers:
            yield from _original_attention(layer, rest, tensor, shape)
        elif module == "mixer":
            yield ".".join([*layer, "mamba", *rest]), tensor
        elif rest[0] == "fc1":  # up over gate
            for half, part in zip(("up_proj", "gate_proj"), tensor.chunk(2), strict=True):
                yield ".".join([*layer, "feed_forward", half, *rest[1:]]), part
        else:
            yield ".".join([*layer, *(ORIGINAL_IN_LAYER.get(part, part) for part in (module, *rest))]), tensor


def _original_attention(
    layer: list[str], rest: list[str], tensor: torch.Tensor, shape: BambaShape
) -> Iterator[tuple[str, torch.Tensor]]:
    if rest[0] == "in_proj":  # q over k over v
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        for module, part in zip(("q_proj", "k_proj", "v_proj"), tensor.split([queries, keys, keys]), strict=True):
            yield ".".join([*layer, "self_attn", module, *rest[1:]]), part
    else:
        module = "o_proj" if rest[0] == "out_proj" else rest[0]
        yield ".".join([*layer, "self_attn", module, *rest[1:]]), tensor


def _belongs_elsewhere(model: nn.Module, shape: BambaShape, name: str) -> bool:
    """Other pipeline stages' weights, the tied head's copy, and rotary tables that old checkpoints carry."""
    return (
        is_pp_missing_parameter(name, model)
        or (shape.tie_word_embeddings and name.startswith("lm_head."))
        or name.endswith("rotary_emb.inv_freq")
    )


def _target(name: str, parameters: dict[str, nn.Parameter]) -> tuple[str | None, str | int | None]:
    """The parameter that takes a checkpoint tensor, and the place in it if it is fused.

    None for the scale of a KV cache that is not quantised here, of which vLLM warns.
    """
    if name.endswith(("scale", "zero_point")):
        kv_scale = maybe_remap_kv_scale_name(name, parameters)
        if kv_scale != name:
            return kv_scale, None
    parts = name.split(".")
    parts[-1] = RENAMED.get(parts[-1], parts[-1])
    if len(parts) > 1 and parts[-2] in STACKED:
        parts[-2], place = STACKED[parts[-2]]
        return ".".join(parts), place
    return ".".join(parts), None


def _places(parameter_name: str) -> list[str | int | None]:
    """The places of a parameter that the checkpoint fills one by one; [None] if it is not fused."""
    parts = parameter_name.split(".")
    fused = parts[-2] if len(parts) > 1 else ""
    return [place for into, place in STACKED.values() if into == fused] or [None]


def _checkpoint_name(parameter_name: str, place: str | int | None) -> str:
    """The inverse of `_target`, for messages."""
    parts = parameter_name.split(".")
    for old, new in RENAMED.items():
        parts[-1] = old if parts[-1] == new else parts[-1]
    for module, into in STACKED.items():
        if len(parts) > 1 and into == (parts[-2], place):
            parts[-2] = module
            break
    return ".".join(parts)


def _load(name: str, parameter: nn.Parameter, place: str | int | None, tensor: torch.Tensor) -> None:
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    try:
        if place is None:
            loader(parameter, tensor)
        else:
            loader(parameter, tensor, place)
    except torch.OutOfMemoryError:  # of which vLLM says what to do
        raise
    except (AssertionError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_of_sizes(error):
            error.add_note(f"while loading checkpoint tensor {name} of shape {tuple(tensor.shape)}")
            raise
        raise ValueError(_misfit(name, tensor, str(error) or f"expected part of {tuple(parameter.shape)}")) from error


def _is_of_sizes(error: RuntimeError) -> bool:
    """Whether tensors do not fit each other, for which torch has no class of errors."""
    return type(error) is RuntimeError and re.search(r"\b(size|shape|dimension)", str(error), re.I) is not None


def _misfit(name: str, tensor: torch.Tensor, reason: str) -> str:
    return (
        f"checkpoint tensor {name} of shape {tuple(tensor.shape)} does not fit the model that config.json describes: "
        f"{reason}"
    )


def _mismatch(missing: list[str], left_over: list[str]) -> str:
    lines = ["the checkpoint does not match the model that its config.json describes."]
    if missing:
        lines.append(f"Missing {len(missing)}: {_some(missing)}. Is every shard of the checkpoint there?")
    if left_over:
        lines.append(f"Left over {len(left_over)}: {_some(left_over)}.")
    return " ".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_files(model: str, load_format: str) -> None:
    """Before anything is loaded, check that a local folder's safetensors are all there and whole.

    Raises:
        ValueError: a shard that the index names is missing, or a file is shorter than its header says.
    """
    folder = pathlib.Path(model)
    if load_format not in ("auto", "safetensors") or not folder.is_dir():
        return  # what the hub's client downloads, it checks
    files = set(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError):
            raise ValueError(f"{index} is not a whole index of shards: fetch it again.") from None
        absent = sorted(name for name in named if not (folder / name).is_file())
        if absent:
            raise ValueError(f"{index.name} in {folder} names files that are missing: {_some(absent)}. Fetch them.")
        files = {folder / name for name in named}
    for file in sorted(files):
        expected, actual = _safetensors_bytes(file), file.stat().st_size
        if actual != expected:
            raise ValueError(f"{file} holds {actual} bytes but its header speaks of {expected}: fetch it again.")


def _safetensors_bytes(file: pathlib.Path) -> int:
    """Bytes that a safetensors file has by its own header: 8, the header, and the last tensor's end."""
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = f.read(length) if 0 < length <= file.stat().st_size else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ValueError(
            f"{file} is not a whole safetensors file: its header cannot be read. Fetch it again."
        ) from None
