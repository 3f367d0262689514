"""Small random Bambas, what Transformers says of them in fp32, and what an engine says."""

from __future__ import annotations

import gc
import math
import pathlib
from dataclasses import dataclass

import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

LIMIT = 1e-4  # largest difference of a logprob, fp32

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "attn_layer_indices": [1, 3],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes: object) -> BambaConfig:
    """A Bamba small enough for a test, whose weights are large enough that every part of it matters."""
    return BambaConfig(**(SMALL | changes), architectures=["BambaForCausalLM"])


def save_random(folder: pathlib.Path, seed: int = 0, shard_size: str = "5GB", **changes: object) -> str:
    """Write a random fp32 checkpoint in Transformers' format; returns its path."""
    torch.manual_seed(seed)
    model = BambaForCausalLM(config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "A_log":
                parameter.uniform_(0.0, 2.5)  # decay rates from 1 to 12
            elif kind == "dt_bias":
                parameter.uniform_(-4.0, 0.0)
            elif kind in ("D", "bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return str(folder)


@dataclass(frozen=True)
class Answer:
    """A request's tokens and their logprobs: the prompt's from its second token on (NaN if not asked for), then the
    generated ones."""

    prompt: list[int]
    generated: list[int]
    logprobs: list[float]


def random_prompts(lengths: list[int], vocabulary: int = 320, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


class Reference:
    """Transformers, one request at a time, the whole sequence in each forward pass, no cache."""

    def __init__(self, model: str | torch.nn.Module, dtype: torch.dtype = torch.float32):
        if isinstance(model, str):
            model = BambaForCausalLM.from_pretrained(model, dtype=dtype)
        self.model = model.eval()
        rotary = self.model.model.rotary_emb.inv_freq
        fraction = self.model.config.rope_parameters["partial_rotary_factor"]
        head_dim = self.model.config.hidden_size // self.model.config.num_attention_heads
        assert 2 * len(rotary) == int(head_dim * fraction), "this Transformers rotates another part of the head"

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocabulary]: of the token that follows each."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)

    def check(self, answer: Answer, limit: float = LIMIT) -> None:
        """Assert that greedy choices are Transformers' own and that every logprob is within `limit`."""
        tokens = answer.prompt + answer.generated
        expected = self.logprobs(tokens)
        of_tokens = expected[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
        given, asked = _asked(answer)
        difference = (of_tokens - given)[asked].abs().max().item()
        assert difference <= limit, f"a logprob is off by {difference:.2e} (limit {limit:.0e})"
        first = len(answer.prompt) - 1
        for step, token in enumerate(answer.generated):
            best = expected[first + step].argmax().item()
            assert token == best, f"token {step} is {token}, Transformers chooses {best}"


def _asked(answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's logprobs, and which of them were asked for: the generated ones, and all of the prompt's or none."""
    given = torch.tensor(answer.logprobs)
    asked = ~given.isnan()
    of_prompt, of_generated = asked.split([len(answer.prompt) - 1, len(answer.generated)])
    assert of_generated.all(), "NaN among the logprobs of what was generated"
    assert of_prompt.all() or not of_prompt.any(), "NaN among the logprobs of the prompt"
    return given, asked


def check_low_precision(answers: list[Answer], exact: Reference, plain: Reference) -> None:
    """Assert that logprobs are about as close to fp32 as Transformers' own run in the engine's precision.

    `plain`, the same tokens in Transformers in that precision, has an error s, root mean square over all requests. A
    request of n logprobs may have twice that (or twice the error that `plain` has of it), and five standard deviations
    more that the root mean square of n normal errors of 2 s has by chance: 2 s (1 + 5 / sqrt(2 n)). A greedy choice may
    differ from fp32's only where fp32 has it no further behind its best than four times the request's largest error.
    """
    compared = []
    for answer in answers:
        tokens = torch.tensor(answer.prompt + answer.generated)
        truth = exact.logprobs(tokens.tolist())
        index = torch.arange(len(tokens) - 1), tokens[1:]
        given, asked = _asked(answer)
        of_plain = (plain.logprobs(tokens.tolist())[index] - truth[index])[asked]
        compared.append((answer, truth, of_plain, (given - truth[index])[asked]))
    usual = torch.cat([of_plain for _, _, of_plain, _ in compared]).square().mean().sqrt().item()
    wrong = []
    for answer, truth, of_plain, of_engine in compared:
        ours, plains = (errors.square().mean().sqrt().item() for errors in (of_engine, of_plain))
        allowed = 2 * max(usual, plains) * (1 + 5 / math.sqrt(2 * len(of_engine)))
        what = f"{len(of_engine)} logprobs behind {len(answer.prompt)} tokens"
        if not ours <= allowed:
            begin = ", ".join(f"{error:.2f}" for error in of_engine[:8].tolist())
            wrong.append(f"{what}: error {ours:.4f} (first ones {begin}), of plain code {plains:.4f}")
        largest = max(of_plain.abs().max(), of_engine.abs().max())
        first = len(answer.prompt) - 1
        for step, token in enumerate(answer.generated):
            choices = truth[first + step]
            behind = (choices.max() - choices[token]).item()
            if not behind <= 4 * largest:
                wrong.append(f"{what}: token {step} is {behind:.4f} behind the best, error {largest:.4f}")
    assert not wrong, f"plain code's error is usually {usual:.4f}\n" + "\n".join(wrong)


class Engine:
    """vLLM with small defaults; a context manager, so that the next test finds the process clean."""

    def __init__(self, model: str, **options: object):
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "seed": 0,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if not torch.cuda.is_available():
            defaults |= {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 64 << 20}
        elif (defaults | options)["dtype"] == "float32":
            pytest.skip("compares an fp32 engine to 1e-4, which a GPU's tf32 products do not hold: for CPUs")
        self.llm = LLM(model=model, **(defaults | options))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    @property
    def scheduler(self):
        """The engine's scheduler; needs the engine in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def answers(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int] = 12,
        prompt_logprobs: bool = True,
        **request: object,
    ) -> list[Answer]:
        """Greedy answers to all prompts in one batch."""
        lengths = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        parameters = [greedy(n, prompt_logprobs) for n in lengths]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False, **request)
        return [_answer(output) for output in outputs]


def greedy(max_tokens: int, prompt_logprobs: bool = True) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        ignore_eos=True,
        detokenize=False,
    )


def _answer(output: RequestOutput) -> Answer:
    """What vLLM says of a finished request."""
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    values = [math.nan] * (len(prompt) - 1)
    if output.prompt_logprobs is not None:
        values = [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    generated = list(completion.token_ids)
    values += [entry[token].logprob for token, entry in zip(generated, completion.logprobs, strict=True)]
    return Answer(prompt, generated, values)


def assert_same(left: list[Answer], right: list[Answer], limit: float = LIMIT) -> None:
    """Assert equal tokens, and logprobs within `limit` wherever both have them."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.prompt == b.prompt
        assert a.generated == b.generated, f"request {index}: {a.generated} != {b.generated}"
        difference = (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).nan_to_num().abs().max().item()
        assert difference <= limit, f"request {index}: a logprob differs by {difference:.2e}"
