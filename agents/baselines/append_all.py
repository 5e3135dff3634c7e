"""Append-all: every chunk an entry, whole, in the order read; nothing is chosen, changed or forgotten.

The memory stream of Park et al., "Generative Agents: Interactive Simulacra of Human Behavior" (arXiv 2304.03442), without what
they build on it: a chunk of the document replaces an observation, entries are retrieved by relevance alone (no recency, no
importance), and there is no reflection. It shows what an agent's choices are worth over storing everything.

An entry is as long as a chunk. An embedder may see its beginning only, and `memory_tokens` limits how many are shown at a time.
"""

from __future__ import annotations

from agents.baselines.rag import store_and_search
from agents.policy import Act
from agents.prompting import Ask
from atommem_env.types import EpisodeSettings


def append_all(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: asks the model nothing while it reads, and once a question; the question is the query."""
    return store_and_search("append-all", settings, ask, lambda chunk: [chunk] if chunk else [])
