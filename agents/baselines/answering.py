"""What all baselines with a model share: how they ask for an answer, and how they read it."""

from __future__ import annotations

from agents.prompting import Ask
from atommem_env.dialects import get_dialect
from atommem_env.dialects.tags import unboxed
from atommem_env.errors import SettingError
from atommem_env.types import EpisodeSettings, Message, Operation, OperationKind

# Without examples: SmolLM2 repeats their answers. A list of what an answer can be it repeats as well.
_FROM_TEXT = (
    "Answer the question from the text. Give the answer alone, in as few words as possible. "
    "If the text does not tell, the answer is: unknown"
)
_FROM_MEMORY = "Answer the question. Give the answer alone, in as few words as possible."


async def answer(ask: Ask, settings: EpisodeSettings, question: str, text: str | None = None) -> str:
    """The model's answer to a question on a text, or without one; "" where it wrote none.

    The question comes last: a prefix cache holds all before it for the next one on the same text.
    """
    parts = [_FROM_MEMORY] if text is None else [_FROM_TEXT, text or "(no text)"]
    prompt = "\n\n".join([*parts, f"Question: {question}\nAnswer:"])
    return answer_in((await ask([Message(role="user", content=prompt)])).text, settings)


def answer_in(text: str, settings: EpisodeSettings) -> str:
    r"""The answer in what a model wrote: the first line with something on it, without the dialect's answer tag and `\boxed{}`.

    >>> answer_in("\n<final_answer>\\boxed{Rome}</final_answer>\nIt is the capital.", EpisodeSettings())
    'Rome'
    >>> answer_in("\n Rome \nIt is the capital.", EpisodeSettings())
    'Rome'
    """
    operations = [item for item in get_dialect(settings.dialect).parse(text) if isinstance(item, Operation)]
    tagged = [operation.text for operation in operations if operation.kind is OperationKind.ANSWER]
    lines = unboxed(tagged[-1] if tagged else text).splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def check_settings(method: str, settings: EpisodeSettings, **needed: object) -> None:
    """Raises `SettingError` where `settings` differ from what `method` needs; of operations it needs at least those named."""
    for name, value in {"advance": "always", **needed}.items():
        actual = getattr(settings, name)
        if not (set(value) <= set(actual) if isinstance(value, tuple) else value == actual):
            least = "at least " if isinstance(value, tuple) else ""
            raise SettingError(f"{method} needs {name} = {least}{value!r}, got {actual!r}.")
