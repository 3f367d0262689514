"""mamba_ssm's original names for a checkpoint, written down without the package's table."""

import torch


def in_mamba_ssms_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as mamba_ssm stores them: q, k, v and up, gate stacked, modules under their old names."""
    plain = {
        "model.embed_tokens.": "backbone.embedding.",
        "model.final_layernorm.": "backbone.norm_f.",
        "model.layers.": "backbone.layers.",
        ".input_layernorm.": ".norm.",
        ".pre_ff_layernorm.": ".norm2.",
        ".feed_forward.down_proj.": ".mlp.fc2.",
        ".self_attn.o_proj.": ".mixer.out_proj.",
        ".mamba.": ".mixer.",
    }
    stacked = {
        (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."): ".mixer.in_proj.",
        (".feed_forward.up_proj.", ".feed_forward.gate_proj."): ".mlp.fc1.",
    }
    original = {}
    for name, tensor in state.items():
        for parts, whole in stacked.items():
            if parts[0] in name:
                name, tensor = (
                    name.replace(parts[0], whole),
                    torch.cat([state[name.replace(parts[0], p)] for p in parts]),
                )
            elif any(part in name for part in parts[1:]):
                name = ""
        for new, old in plain.items():
            name = name.replace(new, old)
        if name:
            original[name] = tensor
    return original
