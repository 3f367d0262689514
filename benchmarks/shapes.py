"""The models that the benchmarks compare, written as folders that vLLM and Transformers can open offline.

Nothing is downloaded. A folder without weights is served with `--load-format dummy`; a folder with weights is either
a checkpoint that the user names or one that `write_random_weights` makes.

| model | what it is |
|---|---|
| `bamba` | this plugin's model |
| `granite` | GraniteMoeHybrid with Bamba's dimensions and no experts: the hybrid that vLLM ships, on vLLM's own mixer |
| `llama` | Llama with Bamba's hidden size, MLP, heads and vocabulary; at 9b that is Llama-3.1-8B |
"""

import gc
import json
import math
import pathlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

MODELS = ("bamba", "granite", "llama")
SHAPES: dict[str, dict] = {
    "9b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "attn_layer_indices": [9, 18, 27],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_rotary_emb": 64,
        "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # the 9b's layers, but narrow: a step on a GPU takes what the host takes
    "narrow": {
        "vocab_size": 128256,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 32,
        "attn_layer_indices": [9, 18, 27],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_rotary_emb": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # for trials and for CI without a GPU; `vllm bench latency` draws token ids below 10000
    "tiny": {
        "vocab_size": 10240,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "attn_layer_indices": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def bamba_config(shape: str) -> BambaConfig:
    """Bamba's config at one of `SHAPES`."""
    if shape not in SHAPES:
        raise SystemExit(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    return BambaConfig(**SHAPES[shape], pad_token_id=0, architectures=["BambaForCausalLM"])


def granite_config(bamba: BambaConfig) -> GraniteMoeHybridConfig:
    """GraniteMoeHybrid without experts that computes what `bamba` computes."""
    attention = set(bamba.attn_layer_indices)
    layers = ["full_attention" if i in attention else "linear_attention" for i in range(bamba.num_hidden_layers)]
    same = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv", "mamba_expand"),
        *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "max_position_embeddings", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_parameters"),
    )
    return GraniteMoeHybridConfig(
        **{name: getattr(bamba, name) for name in same},
        intermediate_size=bamba.intermediate_size,
        shared_intermediate_size=bamba.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=layers,
        position_embedding_type="rope",
        attention_multiplier=(bamba.hidden_size // bamba.num_attention_heads) ** -0.5,
        architectures=["GraniteMoeHybridForCausalLM"],
    )


def llama_config(bamba: BambaConfig) -> LlamaConfig:
    """A plain transformer of Bamba's width and depth; Llama-3.1-8B at shape 9b."""
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    )
    return LlamaConfig(
        **{name: getattr(bamba, name) for name in same},
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder: pathlib.Path, model: str, source: str | pathlib.Path) -> pathlib.Path:
    """Write config and tokenizer of `model`, no weights; returns the folder.

    Args:
        source: one of `SHAPES`, or the folder of a Bamba checkpoint whose dimensions and tokenizer to take.
    """
    if isinstance(source, pathlib.Path):
        bamba, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    else:
        bamba = bamba_config(source)
        tokenizer = word_tokenizer(bamba.vocab_size)
    config = {"bamba": lambda c: c, "granite": granite_config, "llama": llama_config}[model](bamba)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token, so that a prompt of n words has n tokens for every model and nothing is lost in decoding."""
    # vLLM takes texts of up to so many characters a token as the longest word has, and does not count spaces
    words = {f"w{i:0{15 if i == 0 else 1}}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_random_weights(folder: pathlib.Path, shape: str, seed: int, dtype: torch.dtype, device: str) -> pathlib.Path:
    """Add a random Bamba's weights to a folder (20 GB at 9b in bfloat16), so that two programs can read the same."""
    write_model(folder, "bamba", shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(bamba_config(shape), dtype=dtype)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


def write_granite_twin(bamba: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Rewrite a Bamba checkpoint as GraniteMoeHybrid: the same function, which must give the same tokens.

    Raises:
        SystemExit: the checkpoint has what GraniteMoeHybrid has not (biases), or its weights are in several files.
    """
    config = AutoConfig.from_pretrained(bamba)
    if config.mlp_bias or config.attention_bias:
        raise SystemExit(f"{bamba} has biases, which GraniteMoeHybrid has not: leave `granite` out")
    if not (bamba / "model.safetensors").is_file():
        raise SystemExit(f"{bamba}/model.safetensors is missing: the granite twin is made of a single weight file only")
    granite_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bamba).save_pretrained(folder)
    weights = load_file(bamba / "model.safetensors")
    twin = {}
    for name, tensor in weights.items():
        if name.endswith("feed_forward.gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            twin[name.replace("feed_forward.gate_proj", "shared_mlp.input_linear")] = torch.cat([tensor, up])
        elif not name.endswith("feed_forward.up_proj.weight"):
            name = name.replace("pre_ff_layernorm", "post_attention_layernorm").replace("final_layernorm", "norm")
            twin[name.replace("feed_forward.down_proj", "shared_mlp.output_linear")] = tensor
    save_file(twin, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Bytes:
    """What one decode step of a model must at least move.

    Attributes:
        weights: every weight but the embedding table, of which a step reads a row a sequence.
        state: one sequence's convolution and SSM states.
        kv_per_token: keys and values of one cached token.
    """

    weights: int
    state: int
    kv_per_token: int

    def decode_step(self, batch: int, context: int) -> int:
        """Weights once, each sequence's state read and written, its keys and values read."""
        return self.weights + batch * (2 * self.state + context * self.kv_per_token)


def bytes_moved(config: PreTrainedConfig, dtype: torch.dtype, state_dtype: torch.dtype) -> Bytes:
    """Count `Bytes` for a Bamba config with unquantised weights in `dtype`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    attention = len(config.attn_layer_indices)
    mamba = config.num_hidden_layers - attention
    inner = config.mamba_n_heads * config.mamba_d_head
    conv = (inner + 2 * config.mamba_n_groups * config.mamba_d_state) * (config.mamba_d_conv - 1)
    head_dim = config.hidden_size // config.num_attention_heads
    return Bytes(
        weights=parameters * dtype.itemsize,
        state=mamba * (conv * dtype.itemsize + inner * config.mamba_d_state * state_dtype.itemsize),
        kv_per_token=attention * 2 * config.num_key_value_heads * head_dim * dtype.itemsize,
    )


def write_conversations(
    file: pathlib.Path, tokenizer: pathlib.Path, conversations: int, turns: int, first: int, growth: int, seed: int
) -> int:
    """Write a multi-turn data set for `vllm bench serve --dataset-name custom`; returns its number of prompts.

    Turn n + 1 of a conversation is turn n's prompt and `growth` more tokens (the answer and the next question, both
    scripted). All conversations' first turns come first, then all second turns, and so on.
    """
    text = AutoTokenizer.from_pretrained(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, len(text), (conversations, 2 * (first + (turns - 1) * growth)), generator=generator)
    # random tokens need not come back from their text, nor as many; those that did once do again
    tokens = [text.encode(text.decode(of_one), add_special_tokens=False) for of_one in drawn.tolist()]
    with file.open("w") as out:
        for turn in range(turns):
            for conversation in tokens:
                prompt = text.decode(conversation[: first + turn * growth])
                out.write(json.dumps({"prompt": prompt}) + "\n")
    return conversations * turns


def mixed_lengths(count: int, low: int, high: int, seed: int) -> list[int]:
    """`count` prompt lengths between `low` and `high`, log-uniform: many short, few long."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    return (math.log(low) + draws * math.log(high / low)).exp().round().int().tolist()


def random_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of random prompts, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, min(vocab_size, 128000), (n,), generator=generator).tolist() for n in lengths]
