"""mamba_ssm's original names for a checkpoint with Transformers' names, written down without the package's table."""

import torch


def to_original_names(weights: dict[str, torch.Tensor], attention_layers: set[int]) -> None:
    """Rename and stack `weights` in place."""
    for name in list(weights):
        tensor = weights.pop(name)
        weights[_original(name, attention_layers)] = tensor
    for name in [n for n in weights if n.endswith(".mixer.q_proj.weight")]:
        stem = name.removesuffix("q_proj.weight")
        parts = [weights.pop(f"{stem}{p}_proj.weight") for p in "qkv"]
        weights[f"{stem}in_proj.weight"] = torch.cat(parts)
    for name in [n for n in weights if n.endswith(".mlp.up_proj.weight")]:
        stem = name.removesuffix("up_proj.weight")
        parts = [weights.pop(f"{stem}{p}_proj.weight") for p in ("up", "gate")]
        weights[f"{stem}fc1.weight"] = torch.cat(parts)


def _original(name: str, attention_layers: set[int]) -> str:
    if name == "lm_head.weight":
        return name
    name = name.replace("model.", "backbone.", 1)
    for new, old in (
        ("embed_tokens", "embedding"),
        ("final_layernorm", "norm_f"),
        ("input_layernorm", "norm"),
        ("pre_ff_layernorm", "norm2"),
        ("feed_forward", "mlp"),
        ("down_proj", "fc2"),
        (".mamba.", ".mixer."),
        ("self_attn.o_proj", "mixer.out_proj"),
        ("self_attn", "mixer"),
    ):
        name = name.replace(new, old)
    return name
