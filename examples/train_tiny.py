"""Train examples/bamba-tiny: a real Bamba in small, from text that every Python installation carries.

    python examples/train_tiny.py --out examples/bamba-tiny
    python examples/train_tiny.py --out /tmp/bamba-90m --size 90m --vocabulary 4096 --steps 2500 --learning-rate 1e-3 \
        --packages "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

Needs torch, transformers and tokenizers; a GPU with mamba-ssm and causal-conv1d is used where there is one.

Data: the documentation that ships with CPython (the language reference topics of `pydoc_data` and the standard
library's docstrings; PSF License 2.0, which permits redistribution), and with --packages the docstrings of others. One
module's docstrings form one document, one document in twenty is held out. Sequences are packed without padding by
`DataCollatorWithFlattening`: `position_ids` keep attention, `seq_idx` keeps the convolution and the state, inside one
document.

The checkpoint in this repository: 2,600 steps of at most 2,048 tokens, seed 0, on a CPU; held-out perplexity 23.3 a
token, 1.75 bits a byte (`bamba-tiny/training.json`).
"""

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import random
import sys
import sysconfig
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BambaConfig, BambaForCausalLM, DataCollatorWithFlattening, PreTrainedTokenizerFast
from transformers.models.bamba import modeling_bamba

MAX_TOKENS = 2048  # longest sequence, and the tokens of one step
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
SIZES = {  # Bamba in small: head_dim 64 half-rotary, one group of B and C, few attention layers among Mamba-2
    "tiny": {
        "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 5, "attn_layer_indices": [2],
        "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_state": 64,
    },
    "90m": {  # with the 9B's state in each head
        "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 12, "attn_layer_indices": [5],
        "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 24, "mamba_d_state": 128,
    },
}  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# ---------------------------------------------------------------------------------------------- data


def docstrings(path: pathlib.Path) -> list[str]:
    """The docstrings of one source file that are prose: long enough, and not a doctest session."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    texts = (ast.get_docstring(n) for n in nodes)
    return [t for t in texts if t and len(t) > 100 and t.count(">>>") < 3]


def documents(packages: pathlib.Path | None = None) -> dict[str, str]:
    """Every document by its name: the language reference's topics and one document a module, also of `packages`."""
    from pydoc_data.topics import topics

    found = {f"topic {name}": text for name, text in topics.items()}
    seen: set[str] = set()
    for library in filter(None, (pathlib.Path(sysconfig.get_path("stdlib")), packages)):
        for path in sorted(library.rglob("*.py")):
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
                texts = [t for t in docstrings(path) if t not in seen]
                seen.update(texts)
                if texts:
                    found[str(path.relative_to(library))] = "\n\n".join(texts)
    return found


def held_out(name: str) -> bool:
    """One document in twenty, chosen by its name, so that the split does not depend on the order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 20 == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts `<s>` before every text, as Bamba's own tokenizer does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def sequences(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each document, `<s>` first and `</s>` last, cut into pieces of at most MAX_TOKENS."""
    pieces = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        pieces += [ids[i : i + MAX_TOKENS] for i in range(0, len(ids), MAX_TOKENS)]
    return [p for p in pieces if len(p) > 1]


def packed_batches(pieces: list[list[int]], order: random.Random) -> list[list[dict[str, list[int]]]]:
    """One epoch: shuffled sequences in groups of at most MAX_TOKENS tokens."""
    shuffled = pieces[:]
    order.shuffle(shuffled)
    batches: list[list[dict[str, list[int]]]] = []
    room = 0
    for ids in shuffled:
        if len(ids) > room:
            batches.append([])
            room = MAX_TOKENS
        batches[-1].append({"input_ids": ids})
        room -= len(ids)
    return batches


# ------------------------------------------------------------------- packing without the CUDA kernels


def packed_conv(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    """Causal convolution [1, channels, tokens] whose taps stop at a sequence's first token."""
    tokens, width = hidden_states.shape[-1], weight.shape[-1]
    out = torch.zeros_like(hidden_states) if bias is None else bias[:, None].expand_as(hidden_states)
    for lag in range(width):
        same = seq_idx[:, lag:] == seq_idx[:, : tokens - lag]
        past = hidden_states[..., : tokens - lag] * same[:, None]
        out = out + weight[:, width - 1 - lag, None] * F.pad(past, (lag, 0))
    return F.silu(out) if activation == "silu" else out


def packed_scan(hidden_states, dt, A, B, C, D, dt_bias, dt_limit, seq_idx=None, chunk_size=64, **_):
    """The chunked SSD form (Mamba-2, arXiv:2405.21060, section 6) whose state restarts with each sequence.

    hidden_states [1, tokens, heads, head_dim], dt [1, tokens, heads], B and C [1, tokens, 1, state]; one group.
    """
    tokens = hidden_states.shape[1]
    pad = -tokens % chunk_size
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    x, dt, B, C = (F.pad(t[0], (0, 0) * (t.dim() - 2) + (0, pad)) for t in (hidden_states, dt, B, C))
    x, dt, B, C = (t.unflatten(0, (-1, chunk_size)) for t in (x, dt, B[:, 0], C[:, 0]))
    sequence = F.pad(seq_idx[0], (0, pad), value=-1).unflatten(0, (-1, chunk_size))  # [chunks, chunk_size]
    last = sequence[:, -1]
    before = F.pad(last[:-1], (1, 0), value=-2)  # the sequence that the previous chunk ended in

    log_decay = (A * dt).cumsum(1)  # [chunks, chunk_size, heads]
    to_end = (log_decay[:, -1:] - log_decay).exp() * (sequence == last[:, None])[..., None]
    updates = torch.einsum("clh,clhp,cln->chpn", to_end * dt, x, B)
    through = log_decay[:, -1].exp() * (before == last)[:, None]
    state, states = torch.zeros_like(updates[0]), []
    for chunk in range(len(updates)):
        states.append(state)
        state = through[chunk, :, None, None] * state + updates[chunk]

    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    visible = visible & (sequence[:, :, None] == sequence[:, None, :])
    decay = log_decay[:, :, None] - log_decay[:, None]  # [chunks, target, source, heads]
    scores = torch.einsum("cln,csn->cls", C, B)[..., None] * decay.masked_fill(~visible[..., None], -torch.inf).exp()
    y = torch.einsum("clsh,cshp->clhp", scores * dt[:, None], x)
    from_start = log_decay.exp() * (sequence == before[:, None])[..., None]
    y = y + torch.einsum("cln,chpn,clh->clhp", C, torch.stack(states), from_start)
    return (y.flatten(0, 1)[:tokens] + D[:, None] * hidden_states[0])[None]


def honour_seq_idx_without_kernels() -> None:
    """Transformers' torch fallbacks drop `seq_idx`, so packed documents would leak into each other."""
    modeling_bamba.causal_conv1d_fn = packed_conv
    modeling_bamba.mamba2_chunk_scan = packed_scan


# ------------------------------------------------------------------------------------------ training


def build_model(tokenizer: PreTrainedTokenizerFast, size: str) -> BambaForCausalLM:
    """A model of one of `SIZES`, its weights random."""
    config = BambaConfig(
        vocab_size=len(tokenizer),
        attn_rotary_emb=32,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_chunk_size=256,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.02,
        **SIZES[size],
    )
    model = BambaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, modeling_bamba.BambaMixer):  # time steps from 1e-3 to 0.1, as in the Mamba-2 paper
            steps = torch.exp(torch.empty(config.mamba_n_heads).uniform_(math.log(1e-3), math.log(0.1)))
            module.dt_bias.data.copy_(steps + torch.log(-torch.expm1(-steps)))
            module.A_log.data.copy_(torch.empty(config.mamba_n_heads).uniform_(1, 16).log())
    return model


@torch.no_grad()
def perplexity(model, batches, collate) -> float:
    """exp of the mean negative log-likelihood a token over packed sequences."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs = {k: v.to(model.device) for k, v in collate(batch).items()}
        predicted = int((inputs["labels"][:, 1:] != -100).sum())
        total += model(**inputs, use_cache=False).loss.item() * predicted
        count += predicted
    model.train()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--size", choices=[*SIZES], default="tiny")
    parser.add_argument("--vocabulary", type=int, default=1024, help="of the tokenizer")
    parser.add_argument(
        "--packages", type=pathlib.Path, help="folder of Python packages whose docstrings are read, too"
    )
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps of at most 2048 tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    if device == "cpu" or importlib.util.find_spec("mamba_ssm") is None:
        honour_seq_idx_without_kernels()

    texts = documents(args.packages)
    training = [t for name, t in texts.items() if not held_out(name)]
    unseen = [t for name, t in texts.items() if held_out(name)]
    tokenizer = train_tokenizer(training, vocab_size=args.vocabulary)
    pieces = sequences(training, tokenizer)
    validation = packed_batches(sequences(unseen, tokenizer), random.Random(args.seed))
    collate = functools.partial(DataCollatorWithFlattening(return_seq_idx=True), return_tensors="pt")
    model = build_model(tokenizer, args.size).to(device)
    print(
        f"{len(training)} documents, {sum(map(len, pieces))} tokens; held out {len(unseen)}; "
        f"{sum(p.numel() for p in model.parameters())} parameters on {device}",
        flush=True,
    )

    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    warm_up = min(200, args.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    order, start = random.Random(args.seed), time.perf_counter()
    queue: list[list[dict[str, list[int]]]] = []
    for step in range(1, args.steps + 1):
        queue = queue or packed_batches(pieces, order)
        inputs = {k: v.to(device) for k, v in collate(queue.pop()).items()}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
        if step % 1000 == 0:
            print(f"held-out perplexity {perplexity(model, validation, collate):.2f} a token", flush=True)

    score = perplexity(model, validation, collate)
    bytes_a_token = sum(len(t.encode()) for t in unseen) / sum(len(b["input_ids"]) for g in validation for b in g)
    facts = {
        "data": f"CPython {sys.version.split()[0]} documentation (PSF License 2.0)"
        + (" and the docstrings of installed packages" if args.packages else ""),
        "tokens": sum(map(len, pieces)),
        "steps": args.steps,
        "seed": args.seed,
        "held_out_perplexity_per_token": round(score, 2),
        "held_out_bits_per_byte": round(math.log2(score) / bytes_a_token, 3),
        "trained_on": device,
        "torch": torch.__version__,
    }
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
