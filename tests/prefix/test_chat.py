"""Where a chat's system messages end: with a real tokenizer, and with vLLM's own renderer and engine."""

import pytest
from parity import LIMIT, Engine, Reference, _answer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.renderers.params import ChatParams, TokenizeParams

from vllm_bamba.prefix.chat import KEY, REMEMBERED, SystemParts, system_messages

SYSTEM = {
    "role": "system",
    "content": "You answer questions on lists, tuples and dictionaries. Be brief, name the function that helps, and "
    "give one example of its use. Where there is no such function, say so and show a loop.",
}
REFUSES = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
TRIMS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
MOVES = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def render(tokenizer: PreTrainedTokenizerBase, chat: list, template: str | None = None) -> dict[str, list[int]]:
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


@pytest.fixture(scope="module")
def tokenizer(tiny: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny)


def measured(tokenizer: PreTrainedTokenizerBase, chat: list, template: str | None = None) -> int:
    parts, prompt = SystemParts(), render(tokenizer, chat, template)
    for probes in parts.probes([chat], template):
        parts.learn(probes, template, [render(tokenizer, probe, template) for probe in probes])
    parts.mark([chat], template, [prompt])
    return prompt.get(KEY, 0)


@pytest.mark.parametrize(
    ("template", "text"),
    [(None, f"<s>System: {SYSTEM['content']}\n\nUser:"), (TRIMS, f"<system>{SYSTEM['content']}<user>")],
    ids=["own", "trims"],
)
@pytest.mark.parametrize("question", ["What is a list?", "0 or 1?", "Zip?", ""])
def test_what_is_shared_ends_where_the_question_begins(
    tokenizer: PreTrainedTokenizerBase, template: str | None, text: str, question: str
) -> None:
    chat = [SYSTEM, user(question)]
    prompt = render(tokenizer, chat, template)["prompt_token_ids"]
    assert tokenizer.decode(prompt[: measured(tokenizer, chat, template)]) == text


def test_all_leading_system_messages_count_and_later_ones_do_not(tokenizer: PreTrainedTokenizerBase) -> None:
    developer = {"role": "developer", "content": "Use Python 3."}
    assert system_messages([SYSTEM, developer, user("Hello"), SYSTEM]) == [SYSTEM, developer]
    both = measured(tokenizer, [SYSTEM, developer, user("Hello"), SYSTEM])
    assert both > measured(tokenizer, [SYSTEM, user("Hello")]) > 0


def test_content_in_parts_counts_and_what_can_be_read_once_does_not() -> None:
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert system_messages([parts, user("Hello")]) == [parts]
    assert system_messages([{"role": "system", "content": iter(parts["content"])}, user("Hello")]) == []


@pytest.mark.parametrize("chat", [[], [user("Hello")], [user("Hello"), SYSTEM]], ids=["empty", "none", "later"])
def test_without_leading_system_messages_nothing_is_rendered(chat: list) -> None:
    parts, prompt = SystemParts(), {"prompt_token_ids": [1, 2]}
    assert list(parts.probes([chat], None)) == []
    parts.mark([chat], None, [prompt])
    assert KEY not in prompt


def test_a_template_that_puts_the_system_message_last_shares_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert measured(tokenizer, [SYSTEM, user("Hello")], MOVES) == 0


def test_a_system_message_is_rendered_once_for_each_settings() -> None:
    parts, chat = SystemParts(), [SYSTEM, user("Hello")]
    (probes,) = parts.probes([chat], "a")
    parts.learn(probes, "a", [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [1, 2, 4]}])
    assert list(parts.probes([chat, [SYSTEM, user("Bye")]], "a")) == []
    assert len(list(parts.probes([chat], "b"))) == 1
    prompts = [{"prompt_token_ids": [1, 2, 9]}, {"prompt_token_ids": [1, 7]}]
    parts.mark([chat, chat], "a", prompts)
    assert [prompt[KEY] for prompt in prompts] == [2, 1]


def test_what_could_not_be_rendered_is_not_tried_again_and_what_is_remembered_is_bounded() -> None:
    parts = SystemParts()
    for index in range(2 * REMEMBERED):
        chat = [{"role": "system", "content": str(index)}, user("Hello")]
        (probes,) = parts.probes([chat], None)
        parts.learn(probes, None, [])
        assert list(parts.probes([chat], None)) == []
    assert len(parts._known) == REMEMBERED


@pytest.fixture(scope="module")
def engine(tiny: str):  # type: ignore[no-untyped-def]
    with Engine(tiny, skip_tokenizer_init=False) as engine:
        yield engine


def chat(engine: Engine, *messages: dict[str, str], shared: int = 0, **options: object):  # type: ignore[no-untyped-def]
    limits = SamplingParams(
        temperature=0.0, max_tokens=4, logprobs=0, ignore_eos=True,
        extra_args={"bamba_shared_tokens": shared} if shared else None,
    )  # fmt: skip
    (output,) = engine.llm.chat([list(messages)], limits, use_tqdm=False, **options)
    return output


def test_the_second_chat_with_a_system_message_hits_it_and_is_right(
    engine: Engine, tiny: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    reference, ends = Reference(tiny), measured(tokenizer, [SYSTEM, user("?")])
    assert ends >= 48
    first = chat(engine, SYSTEM, user("What is a list?"))
    assert first.num_cached_tokens == 0
    for question in ("How long is a tuple?", "Tell me of dictionaries."):
        output = chat(engine, SYSTEM, user(question))
        assert output.num_cached_tokens == ends // 16 * 16
        reference.check(_answer(output), LIMIT)


def test_answers_of_other_lengths_have_the_same_system_messages(engine: Engine) -> None:
    renderer, chat = engine.llm.llm_engine.renderer, [{"role": "system", "content": "Once."}, user("Hello")]
    before = len(SystemParts.of(renderer)._known)
    for tokens in (10, 20, 30):
        limits = TokenizeParams(max_total_tokens=2048, max_output_tokens=tokens)
        prompts = renderer.render_chat([chat], ChatParams(), limits)[1]
        assert prompts[0][KEY] > 0
    assert len(SystemParts.of(renderer)._known) == before + 1


def test_what_a_chat_itself_says_it_shares_comes_first(engine: Engine) -> None:
    system = {"role": "system", "content": "Another one. " + SYSTEM["content"]}
    chat(engine, system, user("What is a list?"), shared=20)
    assert chat(engine, system, user("How long is a tuple?")).num_cached_tokens == 16


def test_a_template_that_refuses_other_questions_takes_nothing_from_its_chat(engine: Engine) -> None:
    template = "{% if messages[-1]['content'] in ['0', 'Z'] %}{{ raise_exception('no') }}{% endif %}" + TRIMS
    for _ in range(2):
        assert chat(engine, SYSTEM, user("What is a list?"), chat_template=template).outputs[0].token_ids
    with pytest.raises(Exception, match=r"^no$"):
        chat(engine, SYSTEM, user("What is a list?"), chat_template=REFUSES)


def test_other_engines_and_requests_are_left_alone(tiny: str) -> None:
    with Engine(tiny, skip_tokenizer_init=False, additional_config={"bamba_prefix_slots": False}) as engine:
        renderer = engine.llm.renderer
        chat(engine, SYSTEM, user("What is a list?"))
        assert not hasattr(renderer, "bamba_system_parts")
