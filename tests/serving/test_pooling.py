"""What vLLM makes of a language model that does not generate: embeddings and classifiers, against Transformers."""

import pytest
import torch
from parity import Engine, Reference, random_prompts
from transformers import AutoTokenizer

WORDS = ["0", "1"]
LIMIT = 1e-5  # of numbers no larger than 1, in fp32


@pytest.fixture(scope="module")
def reference(tiny: str) -> Reference:
    return Reference(tiny)


def prompts() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in random_prompts([1, 17, 70, 300], vocabulary=1000)]


def test_embeddings_are_transformers_last_hidden_state(tiny: str, reference: Reference) -> None:
    """Of long prompts too, which come in chunks and the second time are found in the cache."""
    options = {"skip_tokenizer_init": False, "max_num_batched_tokens": 64}
    with Engine(tiny, runner="pooling", convert="embed", **options) as engine:
        given = [engine.llm.embed(prompts(), use_tqdm=False) for _ in range(2)]
    assert [output.num_cached_tokens for output in given[1]] == [0, 16, 64, 288]
    for prompt, *outputs in zip(prompts(), *given, strict=True):
        with torch.no_grad():
            hidden = reference.model.model(torch.tensor([prompt["prompt_token_ids"]])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(hidden, dim=0)
        for output in outputs:
            assert (torch.tensor(output.outputs.embedding) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("method", ["no_post_processing", "from_2_way_softmax"])
def test_a_classifier_is_made_of_the_heads_rows(method: str, tiny: str, reference: Reference) -> None:
    overrides = {"classifier_from_token": WORDS, "method": method}
    if method == "from_2_way_softmax":
        overrides["num_labels"] = 1
    options = {"skip_tokenizer_init": False, "hf_overrides": overrides}
    with Engine(tiny, runner="pooling", convert="classify", **options) as engine:
        outputs = engine.llm.classify(prompts(), use_tqdm=False)
    tokens = AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids(WORDS)
    for prompt, output in zip(prompts(), outputs, strict=True):
        expected = reference.logprobs(prompt["prompt_token_ids"])[-1, tokens].softmax(-1)
        given = torch.tensor(output.outputs.probs)
        assert (given - expected[-len(given) :]).abs().max() <= LIMIT
