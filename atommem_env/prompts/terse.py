"""The layout for small models: one user message, no system text, one word before each part that holds something.

A word-level tokenizer finds one token in each marker, and, as running text does not use them, one that means nothing else. An
empty part is left out with its marker, so what the settings switch off costs nothing. The order is that of `shared_prefix`.

    QUESTIONS
    Who hired Ada Park?
    TEXT
    Ada Park works for Bo Lund.
    MEMORY
    m1: Bo Lund lives in Rome.
"""

from __future__ import annotations

from atommem_env.types import EpisodeSettings, Message, Observation


def messages(observation: Observation, settings: EpisodeSettings) -> list[Message]:
    """One user message. Needs no look at `settings`: what they switch off is empty in the observation."""
    parts = [
        ("QUESTIONS", observation["questions"]),
        ("TEXT", observation["chunk"]),
        ("NOTICE", observation["notice"]),
        ("NOTES", observation["scratchpad"]),
        ("QUERY", observation["query"]),
        ("MEMORY", observation["retrieved"]),
        ("ANSWER", observation["question"]),
    ]
    return [Message(role="user", content="\n".join(f"{marker}\n{text}" for marker, text in parts if text))]
