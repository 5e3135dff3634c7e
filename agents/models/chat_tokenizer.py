"""How messages become token ids; sampling and training both use this."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.models.thinking import opens_thought, without_thought
from atommem_env.errors import MissingDependency, PromptTooLong, SettingError
from atommem_env.types import Message

# Turns that a tokenizer remembers: the rollouts of a group open with the same prompt, and so do those of a second epoch.
_REMEMBERED = 1024
_TAIL = 16  # tokens of a prompt in which its template can open a thought
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"  # around what must stay text; of Unicode's private use area
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")


class ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face model folder.

    Raises:
        MissingDependency: transformers is not installed.
        SettingError: there is no chat template.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingDependency(f"A local model needs {error.name!r}: pip install 'atommem[local]'.") from error
        self.backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not self.backend.chat_template:
            raise SettingError(f"The model must be a chat model; {folder} has no chat template in its tokenizer.")
        self._system_role = self._has_system_role()
        special = (re.escape(token.content) for token in self.backend.added_tokens_decoder.values() if token.special)
        self._control_token = re.compile("|".join(sorted(special, key=len, reverse=True)) or r"(?!)")
        self._remembered: dict[tuple[bool, tuple[tuple[str, str], ...]], list[int]] = {}

    def prompt_ids(self, messages: Sequence[Message], thinking: bool = False) -> list[int]:
        """The ids of chat messages, up to where the reply begins.

        Where the model's template knows no system role, the system message opens the first user message.

        Args:
            thinking: whether a model that can think before it replies (Qwen3) is asked to.
        """
        chat = list(messages) if self._system_role else fold_system(messages)
        key = thinking, tuple((message["role"], message["content"]) for message in chat)
        if key not in self._remembered:
            if len(self._remembered) == _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._encode(chat, thinking)
        return list(self._remembered[key])

    def _encode(self, chat: list[Message], thinking: bool) -> list[int]:
        # What a document or an entry says is text, also where it spells a control token: it must not end the message. Such
        # text is marked by characters that no text has, by which it is recognised in what the template made of it.
        marked = [
            {**message, "content": self._control_token.sub(rf"{_OPEN}\g<0>{_CLOSE}", _MARK.sub("", message["content"]))}
            for message in chat
        ]
        # Other templates than those of models that can think ignore the word.
        rendered = self.backend.apply_chat_template(
            marked, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        ids: list[int] = []
        for number, part in enumerate(_MARK.split(rendered)):
            if part:
                ids += self.backend.encode(part, add_special_tokens=False, split_special_tokens=number % 2 == 1)
        return ids

    def completion_ids(self, reply: str) -> list[int]:
        """The ids of a reply that a model is to learn, its end included; sampled replies keep the ids they were sampled with."""
        ids = self.backend.encode(reply, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.backend.eos_token_id]

    def text(self, completion_ids: Sequence[int]) -> str:
        """What sampled ids say, special tokens left out."""
        decoded = self.backend.decode(
            list(completion_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def reply_text(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
        """`text` without what the model thought before it replied."""
        end = self.backend.decode(list(prompt_ids[-_TAIL:]), clean_up_tokenization_spaces=False)
        return without_thought(self.text(completion_ids), opens_thought(end))

    def _has_system_role(self) -> bool:
        """Whether the template shows a system message; some reject it, some drop it silently."""
        from jinja2 import TemplateError

        chat = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "USER-PROBE"}]
        try:
            return "SYSTEM-PROBE" in self.backend.apply_chat_template(chat, tokenize=False)
        except TemplateError:
            return False


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The chat for a template without a system role: the system message opens the first user message.

    >>> fold_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
    [{'role': 'user', 'content': 'Be brief.\\n\\nWho?'}]
    """
    chat = list(messages)
    if len(chat) > 1 and chat[0]["role"] == "system":
        system, user = chat[:2]
        chat[:2] = [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}]
    return chat


def check_room(tokens: int, max_new_tokens: int, window: int, name: str) -> None:
    """Whether a prompt and its reply fit into the window of the model `name`.

    Raises:
        PromptTooLong: they do not.
        SettingError: there is nothing to read or to write.
    """
    if tokens < 1 or max_new_tokens < 1:
        raise SettingError(f"A prompt and its reply need a token each at least; got {tokens} and {max_new_tokens=}.")
    if tokens + max_new_tokens > window:
        raise PromptTooLong(
            f"The prompt's {tokens} tokens and up to {max_new_tokens} new ones exceed {name}'s window of {window} tokens. "
            "Make chunk_tokens, memory_tokens or max_new_tokens smaller.",
            tokens=tokens,
            room=max(window - max_new_tokens, 0),
        )
