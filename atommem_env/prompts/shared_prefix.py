"""The default layout: what all rollouts of a group share comes first.

System text, questions and chunk are the same for every rollout that reads the same chunk of the same task; notice,
scratchpad, query and entries differ. In this order an engine with a prefix cache computes the common part once.
"""

from __future__ import annotations

from atommem_env.dialects import get_dialect
from atommem_env.types import EpisodeSettings, Message, Observation, Phase

_SYSTEM = """\
You read a long document piece by piece and must answer questions about it once all of it has been read. You cannot turn \
back: what you do not keep in your memory is lost. On every turn you may write any number of these tags; they are carried \
out in the order written, and anything outside of them is ignored.

{operations}"""


def messages(observation: Observation, settings: EpisodeSettings) -> list[Message]:
    """A system message and one user message that holds the whole observation."""
    reading = observation["phase"] == Phase.READ
    parts = [("Questions" if "\n" in observation["questions"] else "Question", observation["questions"])]
    parts += [("Document, next piece", observation["chunk"])] if reading else []
    parts += [("Notice about your last turn", observation["notice"])] if observation["notice"] else []
    parts += [("Scratchpad", observation["scratchpad"] or "(empty)")] if settings.scratchpad else []
    if "read" in settings.operations:
        parts += [("Search in force", observation["query"] or "(none)")]
        parts += [("Memory entries found", observation["retrieved"] or "(none)")]
    if not reading:
        parts += [("The document has ended. Answer this question now", observation["question"])]
    system = _SYSTEM.format(operations=get_dialect(settings.dialect).describe(settings))
    user = "\n\n".join(f"## {title}\n{text}" for title, text in parts)
    return [Message(role="system", content=system), Message(role="user", content=user)]
