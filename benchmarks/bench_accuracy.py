"""Does the precision in which the fused step keeps its states change what a model predicts?

    python benchmarks/bench_accuracy.py                                                        # on a GPU
    TRITON_INTERPRET=1 python benchmarks/bench_accuracy.py --tokens 20 --texts 1 --generated 4    # a CPU, 5 minutes

A batch is walked token by token, from empty slots on, through Transformers' own modules, but convolution and recurrence
of Mamba layers are `mixer_step` on slots of the precision in question. Precisions stand side by side in one batch and
get the same tokens. The truth is an fp32 state, written every step; walks with fp32 states must give the logits of
Transformers' forward pass, or nothing is reported. Half of the rows read held-out texts, for a perplexity. The others
begin as those do and go on with tokens sampled from what the fp32 state predicts, end-of-text excepted; over the last
of them distributions are compared, KL(fp32 || other). A precision passes within two limits, chosen before any was run:

- Mean KL 1e-3 nats. By Pinsker's inequality the probability of a token, or of any set of tokens, is then off by at
  most 2.3 % on average, and it takes a thousand tokens to learn one nat about which state is in use.
- Perplexity 0.1 % above fp32's: 1e-3 nats a token, the price of that divergence on texts of the model's own.
"""

import argparse
import functools
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from transformers import AutoTokenizer, BambaForCausalLM

from vllm_bamba.config import BambaShape
from vllm_bamba.ops.mixer_step import StepWeights, mixer_step
from vllm_bamba.ops.slot_state import empty_inputs, write_slots
from vllm_bamba.state import EIGHT_BITS, DecodePlan, FusedSlots, SlotFormat, mixer_shard

PERPLEXITY_LIMIT = 1e-3  # relative to fp32's
KL_LIMIT = 1e-3  # nats a token, on average
PROMPT = 16  # tokens before the generated ones
COMPARED = 64  # generated tokens, the last, on which distributions are compared
CHECKED = 64  # tokens of each text on which fp32 walks must be Transformers' forward pass
WALK_LIMIT = 1e-4  # largest difference of a logit there
ROOT = pathlib.Path(__file__).parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]  # train_tiny, triton_interpreter

Precision = tuple[torch.dtype, int]  # of the state, and tokens of the ring in front of it (0: it is written every step)
EXACT: Precision = (torch.float32, 0)
STATES = (torch.float32, torch.bfloat16, torch.float16, *EIGHT_BITS.values())


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "examples/bamba-tiny", help="checkpoint's folder")
    parser.add_argument("--text", type=pathlib.Path, help="file of held-out text (default: train_tiny.py's)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a text")
    parser.add_argument("--texts", type=int, default=8, help="texts, and as many prompts to go on from")
    parser.add_argument("--generated", type=int, default=2000, help="tokens after each prompt")
    parser.add_argument("--replays", nargs="+", type=int, choices=[0, 8, 16, 32], default=[0, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights and activations")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.tokens < PROMPT or min(args.texts, args.generated) < 1:
        parser.error(f"--tokens must be {PROMPT} or more, --texts and --generated positive")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in that folder")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("there is no GPU; TRITON_INTERPRET=1 runs the step in Triton's interpreter, for small sizes")
    return args


def held_out_texts(args: argparse.Namespace) -> tuple[torch.Tensor, str]:
    """Texts [texts, tokens] that nobody trained on, from evenly spaced places of what there is, and what that is."""
    if args.text is not None:
        text, source = args.text.read_text("utf-8"), args.text.name
    else:
        import train_tiny

        try:
            documents = train_tiny.documents()
        except ModuleNotFoundError as error:
            raise SystemExit(f"this Python comes without its documentation ({error}): pass --text FILE") from None
        unseen = [text for name, text in documents.items() if train_tiny.held_out(name)]
        text, source = "\n\n".join(unseen), f"{len(unseen)} held-out documents of CPython {platform.python_version()}"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bos, ids = tokenizer.bos_token_id, tokenizer(text, add_special_tokens=False)["input_ids"]
    source, spare = f"{len(ids)} tokens of {source}", len(ids) - (args.tokens - 1)
    if spare < args.texts - 1:
        raise SystemExit(f"{source} are too few for {args.texts} texts of {args.tokens}: pass a longer --text FILE")
    starts = [spare * i // max(args.texts - 1, 1) for i in range(args.texts)]
    return torch.tensor([[bos, *ids[start : start + args.tokens - 1]] for start in starts]), source


class Attended:
    """Keys and values of all tokens so far, in memory made ahead; attention modules take it for Transformers' cache."""

    def __init__(self, model: BambaForCausalLM, shape: BambaShape, rows: int, steps: int):
        size = (2, rows, shape.num_key_value_heads, steps, shape.head_dim)
        self.layers = {i: torch.empty(size, dtype=model.dtype, device=model.device) for i in shape.attention_layers}
        self.position = 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object) -> tuple[torch.Tensor, ...]:
        """Add one token, [rows, heads, 1, head_dim] each; returns all of them."""
        kept, end = self.layers[layer], self.position + 1
        kept[0, :, :, self.position : end], kept[1, :, :, self.position : end] = keys, values
        return kept[..., :end, :].unbind()


class Mixer(torch.nn.Module):
    """A Mamba layer whose batch has one part for each precision, in slots of that precision."""

    def __init__(self, mixer: Any, shape: BambaShape, precisions: Sequence[Precision], plan: DecodePlan):
        super().__init__()
        self.mixer, self.plan, self.limit, self.inner = mixer, plan, shape.time_step_limit, shape.mamba_intermediate
        taps, A = mixer.conv1d.weight[:, 0].t().contiguous(), -mixer.A_log.float().exp()
        self.weights = StepWeights(taps, mixer.conv1d.bias, A, mixer.D, mixer.dt_bias, norm=None)
        self.slots = []
        for state_dtype, replay in precisions:
            form = SlotFormat(mixer_shard(shape, 1), shape.conv_width, taps.dtype, state_dtype, replay)
            self.slots.append(empty_slots(form, plan))

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        """One token of every row, [precisions * rows, 1, hidden size] in and out."""
        projected = self.mixer.in_proj(hidden_states[:, 0])
        y = projected.new_empty(len(projected), self.inner)
        parts = (t.split(self.plan.num_tokens) for t in (projected, y))
        for slots, given, out in zip(self.slots, *parts, strict=True):
            mixer_step(given, self.weights, self.limit, slots, self.plan, out)
        return self.mixer.out_proj(self.mixer.norm(y, projected[:, : self.inner]))[:, None]


def empty_slots(form: SlotFormat, plan: DecodePlan) -> FusedSlots:
    """Slots of the plan's sequences, which have no tokens yet; slot 0 is padding."""
    rows, device = plan.num_tokens, plan.slots.device
    slots = form.empty(rows + 1, device)
    states = torch.zeros(rows, *slots.ssm.shape[1:], device=device)
    all_rows = torch.arange(rows, dtype=torch.int32, device=device)
    write_slots(slots, plan.slots[:, 0], plan.lengths, empty_inputs(slots, rows).zero_(), states, all_rows)
    return slots


class Walk:
    """Token by token through a model, once for each precision. The model's Mamba layers are exchanged for ours."""

    def __init__(self, model: BambaForCausalLM, precisions: Sequence[Precision], rows: int, steps: int):
        self.model, self.copies, shape = model, len(precisions), BambaShape.from_hf(model.config)
        numbers = torch.arange(max(rows + 1, steps), dtype=torch.int32, device=model.device)
        self.positions, slots = numbers[None], numbers[1 : rows + 1, None]
        self.plan = DecodePlan(rows, slots, torch.zeros_like(slots[:, 0]), query_start_loc=None, accepted=None)
        self.attended = Attended(model, shape, self.copies * rows, steps)
        for i in set(range(shape.num_layers)) - shape.attention_layers:
            model.model.layers[i].mamba = Mixer(model.model.layers[i].mamba, shape, precisions, self.plan)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 logits [precisions, rows, vocabulary] of what follows `tokens` [rows]."""
        position = self.attended.position
        self.plan.lengths.fill_(position + 1)
        given, masks = tokens.repeat(self.copies)[:, None], {"full_attention": None, "linear_attention": None}
        where = {"position_ids": self.positions[:, position : position + 1], "past_key_values": self.attended}
        logits = self.model(given, attention_mask=masks, use_cache=True, **where).logits
        self.attended.position += 1
        return logits.float().view(self.copies, len(tokens), -1)


def check_walk(model: BambaForCausalLM, texts: torch.Tensor, replays: Sequence[int]) -> float:
    """Largest difference of a logit between fp32 walks and Transformers' forward pass; ends the run above the limit."""
    exact = torch.cat([model(text[None], use_cache=False).logits for text in texts])
    walk = Walk(model, [(torch.float32, replay) for replay in replays], *texts.shape)
    logits = torch.stack([walk.step(tokens) for tokens in texts.T], 2)
    off = (logits - exact).abs().max().item()
    if not off <= WALK_LIMIT:  # NaN is wrong too
        raise SystemExit(f"nothing to report: the walk is not Transformers' forward pass, a logit is off by {off:.1e}")
    return off


def follow(walk: Walk, tokens: torch.Tensor, args: argparse.Namespace, draw: bool) -> tuple[list[float], torch.Tensor]:
    """Walk `tokens` [2 * texts, steps + 1]: texts, then prompts and what follows them, which is drawn or stands there.

    Returns the texts' perplexity by precision, and logits to compare, [precisions, texts, compared, vocabulary].
    """
    steps, end = tokens.shape[1] - 1, PROMPT + args.generated
    sampler = torch.Generator(tokens.device).manual_seed(args.seed)
    stops = torch.tensor(walk.model.config.eos_token_id, device=tokens.device)
    losses, compared = torch.zeros(walk.copies, dtype=torch.float64, device=tokens.device), []
    for t in range(steps):
        if t % 512 == 0:
            progress(f"{dtype_name(walk.model.dtype)} activations: token {t} of {steps}")
        read, written = walk.step(tokens[:, t]).split(args.texts, 1)
        if t + 1 < args.tokens:
            following = tokens[: args.texts, t + 1].repeat(walk.copies)
            losses += F.cross_entropy(read.flatten(0, 1), following, reduction="none").view(walk.copies, -1).sum(1)
        if max(PROMPT, end - COMPARED) <= t < end:
            compared.append(written.clone())
        if draw and t + 1 >= PROMPT:
            likely = written[0].index_fill(1, stops, -torch.inf).softmax(-1)
            tokens[args.texts :, t + 1] = (likely / torch.empty_like(likely).exponential_(generator=sampler)).argmax(-1)
    return (losses / (args.texts * (args.tokens - 1))).exp().tolist(), torch.stack(compared, 2)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """KL(exact || other) in nats over rows of logits [..., vocabulary]: mean, 99th percentile and maximum."""
    p, q = (logits.double().log_softmax(-1) for logits in (exact, other))
    nats = (p.exp() * (p - q)).sum(-1).clamp(min=0).flatten()
    return {"kl_mean": nats.mean().item(), "kl_p99": nats.quantile(0.99).item(), "kl_worst": nats.max().item()}


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    if not torch.cuda.is_available():
        from triton_interpreter import use_interpreter_without_a_gpu

        use_interpreter_without_a_gpu()  # which computes with bf16 as GPUs do
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype_of(args.dtype)
    load = functools.partial(BambaForCausalLM.from_pretrained, args.model)
    texts, source = held_out_texts(args)
    results = Results.of(
        "bench_accuracy", args, list(argv), model=args.model.name, weights="checkpoint", cache_mode="none", repeats=1,
        case="texts read, others generated", batch=args.texts, prompt_tokens=args.tokens, output_tokens=args.generated,
        details=f"{source}; limits: perplexity {PERPLEXITY_LIMIT:+.1%}, mean KL {KL_LIMIT:g} nats",
    )  # fmt: skip
    progress("comparing fp32 walks with Transformers")
    off = check_walk(load(dtype=torch.float32).to(device), texts[:, :CHECKED].to(device), sorted({0, *args.replays}))
    tokens = texts.new_zeros(2 * args.texts, max(args.tokens, PROMPT + args.generated + 1), device=device)
    tokens[: args.texts, : args.tokens], tokens[args.texts :, :PROMPT] = texts, texts[:, :PROMPT]
    precisions = [EXACT, *(p for r in args.replays for s in STATES if (p := (s, r)) != EXACT)]
    walk = Walk(load(dtype=dtype).to(device), precisions, len(tokens), tokens.shape[1] - 1)
    perplexities, logits = follow(walk, tokens, args, draw=True)
    measured = [(dtype, *row) for row in zip(precisions, perplexities, logits, strict=True)]
    if dtype == torch.float32:  # a yardstick: what is lost by activations in bf16, as usual in serving
        walk = Walk(load(dtype=torch.bfloat16).to(device), [EXACT], len(tokens), tokens.shape[1] - 1)
        measured.append((torch.bfloat16, EXACT, *(part[0] for part in follow(walk, tokens, args, draw=False))))

    print("activations  state     replay  perplexity    change   KL mean       99%     worst  verdict")
    for activations, precision, perplexity, given in measured:
        nats, change = divergence(logits[0], given), perplexity / perplexities[0] - 1
        verdict = "pass" if change <= PERPLEXITY_LIMIT and nats["kl_mean"] <= KL_LIMIT else "fail"  # NaN fails
        if precision == EXACT:
            verdict = "reference" if activations == dtype else "yardstick"
        (state, replay), named = (dtype_name(precision[0]), precision[1]), dtype_name(activations)
        print(f"{named:12} {state:9} {replay:6} {perplexity:11.4f} {change:+9.4%}", end="")
        print(*(f" {value:9.2e}" for value in nats.values()), f"  {verdict}", sep="")
        columns = {"variant": f"replay_{replay}", "dtype": named, "state_dtype": state}
        columns["verified"] = f"{verdict}; fp32 walks within {off:.1e} of Transformers"
        for metric, value in {"perplexity": perplexity, **nats}.items():
            results.add(metric=metric, value=value, unit="nats" if metric in nats else "1/token", **columns)
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
