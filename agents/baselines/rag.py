"""RAG: every document an entry, the question as the query, the retrieved entries in the prompt.

Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks" (arXiv 2005.11401), as the AtomMem paper's
baseline has it (arXiv 2601.08323): one document, one entry, the best six. Neither retriever nor model is trained, and all entries
retrieved stand in one prompt, where Lewis et al. weigh one document at a time. The environment searches: `top_k` says how many,
`retrieval` how ("top_k" is dense, as in Karpukhin et al., arXiv 2004.04906; "bm25"; "hybrid"), `embedder` by what.
"""

from __future__ import annotations

from collections.abc import Callable

from agents.baselines.answering import answer, check_settings
from agents.policy import Act
from agents.prompting import Ask, render_reply
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase


def rag(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: asks the model nothing while it reads, and once a question.

    An empty line separates two documents; one that has empty lines in it, as those of
    AtomMem-Files may, becomes an entry a paragraph.
    """
    return store_and_search("rag", settings, ask, WholeDocuments(settings).take)


def store_and_search(name: str, settings: EpisodeSettings, ask: Ask, entries: Callable[[str], list[str]]) -> Act:
    """Stores what `entries` makes of each chunk and answers from what the question retrieves.

    A question costs one reply. The matches of a Read are seen a step later, so the first question is searched for while reading,
    and each later one in the reply that answers the question before.

    Args:
        entries: the entries to store, given a chunk; given "", those that it still holds back. Called once a chunk, then with "".
    """
    check_settings(name, settings, operations=("create", "read"), operations_per_reply=None)
    chunk = query = ""

    async def act(observation: Observation) -> str:
        nonlocal chunk, query
        reading = observation["phase"] == Phase.READ
        repeated = reading and observation["chunk"] == chunk  # with read latency 0, after the Read
        chunk = observation["chunk"]
        creates = [Operation(OperationKind.CREATE, text) for text in ([] if repeated else entries(chunk))]
        questions = observation["questions"].splitlines()
        question = questions[0] if reading else observation["question"]
        if reading or creates or query != question:
            reads = [] if reading and query else [Operation(OperationKind.READ, question)]
            query = question
            return render_reply(settings, *creates, *reads)
        said = await answer(ask, settings, question, observation["retrieved"])
        if not said:
            return ""
        following = questions[questions.index(question) + 1 :][:1] if question in questions else []
        query = "".join(following)
        reads = [Operation(OperationKind.READ, text) for text in following]
        return render_reply(settings, Operation(OperationKind.ANSWER, said), *reads)

    return act


class WholeDocuments:
    r"""Splits chunks into their documents, and joins a document that was split over several chunks.

    Only a document longer than a chunk is split (`atommem_env.chunking`), and each piece bears its title. The last document of a
    chunk is held back where it fills more than half a chunk: it may continue in the next. Two neighbours of one title are joined
    as well where the end of a chunk separates them and no chunk could hold both.

    >>> whole = WholeDocuments(EpisodeSettings(chunk_tokens=8))
    >>> whole.take("A\nOne.\n\nB\nTwo three four five."), whole.take("B\nSix seven.\n\nC\nEight."), whole.take("")
    (['A\nOne.'], ['B\nTwo three four five. Six seven.', 'C\nEight.'], [])
    """

    def __init__(self, settings: EpisodeSettings) -> None:
        self._limit = settings.chunk_tokens
        self._count = get_tokenizer(settings.tokenizer).count
        self._held = ""

    def take(self, chunk: str) -> list[str]:
        """The documents that are complete with this chunk, each as title, line break, text; "" ends the last one."""
        held, self._held = self._held, ""
        parts = [part for part in chunk.split("\n\n") if part.strip()]
        if not parts:
            return [held] if held else []
        if held:
            title, _, text = parts[0].partition("\n")
            joined = f"{held} {text}"
            if held.partition("\n")[0] == title and self._count(joined) > self._limit:
                parts[0] = joined
            else:  # another document, perhaps of the same title: as one, both would not have been split
                parts.insert(0, held)
        if 2 * self._count(parts[-1]) > self._limit:
            self._held = parts.pop()
        return parts
