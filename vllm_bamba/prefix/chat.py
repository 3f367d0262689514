"""Where the system messages of a chat end in its prompt: other chats will share that part.

A chat template may put anything around a message and a tokenizer may join it with what follows, so nothing is assumed
of either: the system messages are rendered once more before each of two other questions. What both texts and the
prompt itself begin with is the shared part. This runs where prompts are rendered, in the process of the API server or
of `LLM`; the length travels to the scheduler in the request's sampling parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

ROLES = ("system", "developer")
QUESTIONS = ("0", "Z")  # begin with no token in common
REMEMBERED = 64  # different system messages
KEY = "bamba_system_tokens"  # in a rendered prompt, and in `extra_args` on the way to the scheduler


class SystemParts:
    """What prompts with the same system messages begin with, for those last seen.

    `settings` is all that decides how a chat is rendered: its template, tools, special tokens.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    @classmethod
    def of(cls, renderer: Any) -> SystemParts:
        """The one that belongs to a renderer."""
        if not hasattr(renderer, "bamba_system_parts"):
            renderer.bamba_system_parts = cls()
        return renderer.bamba_system_parts

    def probes(self, chats: Sequence[Sequence[Any]], settings: object) -> Iterator[list[list[Any]]]:
        """For each of these chats whose system messages are new: what must be rendered, and given to `learn`."""
        for chat in chats:
            head = system_messages(chat)
            if head and _name(head, settings) not in self._known:
                yield [[*head, {"role": "user", "content": question}] for question in QUESTIONS]

    def learn(self, probes: Sequence[Sequence[Any]], settings: object, rendered: Sequence[Any]) -> None:
        """Take the probes' prompts; none where they could not be rendered, which is not tried again."""
        texts = [prompt.get("prompt_token_ids") or [] for prompt in rendered]
        self._known[_name(system_messages(probes[0]), settings)] = common_start(*texts)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def mark(self, chats: Sequence[Sequence[Any]], settings: object, prompts: Sequence[Any]) -> None:
        """Enter in each prompt how many of its tokens belong to its chat's system messages, where that is known."""
        for chat, prompt in zip(chats, prompts, strict=True):
            if not (head := system_messages(chat)):
                continue
            name = _name(head, settings)
            if start := self._known.get(name):
                self._known.move_to_end(name)
                prompt[KEY] = len(common_start(start, prompt.get("prompt_token_ids") or []))


def system_messages(chat: Sequence[Any]) -> list[Any]:
    """The system messages with which a chat begins, up to one whose content can be read only once."""
    head = takewhile(lambda message: isinstance(message, dict) and message.get("role") in ROLES, chat)
    return list(takewhile(lambda message: isinstance(message.get("content"), str | list), head))


def common_start(*texts: Sequence[int]) -> list[int]:
    """The tokens that all texts begin with."""
    if not texts:
        return []
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return [tokens[0] for tokens in same]


def _name(head: list[Any], settings: object) -> str:
    return repr((head, settings))
