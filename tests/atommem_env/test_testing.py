"""The checkers accept this project's parts and reject broken ones, with a sentence that names the fault."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

import atommem_env  # noqa: F401  registers the environments
from atommem_env import dialects
from atommem_env.dialects.tags import TagsDialect
from atommem_env.embedders.hashing import HashingEmbedder
from atommem_env.tasks import make_source
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.testing import check_dialect, check_embedder, check_env, check_task_source
from atommem_env.types import (
    EmbeddingKind,
    Entry,
    EpisodeSettings,
    Evidence,
    Operation,
    OperationResult,
    Question,
    Task,
)

# --------------------------------------------------------------------------------------------------- what is ours passes


@pytest.mark.parametrize("name", sorted(dialects._DIALECTS))
def test_every_dialect_passes(name: str) -> None:
    check_dialect(dialects.get_dialect(name))


@pytest.mark.parametrize(
    "options", [{}, {"split": "test", "questions": 3, "num_docs": 40}, {"hops": (1,), "num_docs": 5}]
)
def test_the_synthetic_source_passes(options: dict[str, Any]) -> None:
    check_task_source(SyntheticSource(**options))


@pytest.mark.parametrize("dataset", ["hotpotqa", "2wikimultihopqa", "musique"])
def test_every_source_of_real_questions_passes(dataset: str, shared_data: Path) -> None:
    check_task_source(make_source(dataset, data=shared_data / f"{dataset}_dev.jsonl.gz", num_docs=60, questions=2))


def test_the_source_of_ones_own_files_passes(tmp_path: Path) -> None:
    for name in ("Ada", "Bo", "Cy"):
        (tmp_path / f"{name}.txt").write_text(f"{name} lives in Rome.")
    rows = [{"question": f"Where does {name} live?", "answer": "Rome"} for name in ("Ada", "Bo", "Cy")]
    rows[0]["evidence"] = [{"file": "Ada.txt", "text": "lives in Rome"}]  # type: ignore[assignment]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.txt") for name in ("Ada", "Bo", "Cy")]
    check_task_source(FilesSource(files=files, data=questions), shuffled=False)


@pytest.mark.parametrize("env_id", ["AtomMem-Synthetic", "AtomMem/Synthetic-v0"])
def test_every_environment_that_needs_no_data_passes(env_id: str) -> None:
    env = gym.wrappers.TimeLimit(gym.make(env_id, durability="off", num_docs=12, chunk_tokens=60), 50)
    check_env(env)
    env.close()


def test_no_test_runner_and_no_torch_is_needed() -> None:
    code = "import sys, atommem_env.testing; print({'pytest', 'hypothesis', 'torch', 'lancedb', 'agents'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------------------- broken dialects


class ByRaising(TagsDialect):
    def parse(self, reply: str) -> list[Operation | OperationResult]:
        int(reply) if reply.isdigit() else None
        return super().parse(reply)


class BySquashingLines(TagsDialect):
    def write(self, operation: Operation) -> str:
        return super().write(replace(operation, text=" ".join(operation.text.split())))


class ByOrder(TagsDialect):
    def parse(self, reply: str) -> list[Operation | OperationResult]:
        return sorted(super().parse(reply), key=lambda item: str(item.kind))


class ByHalves(TagsDialect):
    """Carries out truncated operations."""

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        _, opened, rest = reply.rpartition("<create_memory>")
        return super().parse(f"{reply}</create_memory>" if opened and "</" not in rest else reply)


class BySlowness(TagsDialect):
    def parse(self, reply: str) -> list[Operation | OperationResult]:
        for start in range(0, len(reply), 50):
            reply.count("<", start)
        return super().parse(reply)


class ByShow(TagsDialect):
    def show(self, entries: Sequence[Entry]) -> str:
        return "\n".join(f"{entry.id}: {entry.text}" for entry in entries)


class ByDescription(TagsDialect):
    def describe(self, settings: EpisodeSettings) -> str:
        return super().describe(EpisodeSettings())


class ByForm(TagsDialect):
    def parse(self, reply: str) -> Any:
        return tuple(super().parse(reply))


class ByNames(TagsDialect):
    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        return shown[0] if shown else target


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ByRaising(), r"parse\('1111.*5000 characters\)\) raised ValueError"),
        (BySquashingLines(), r"parse must read Operation\(.*first line\\nsecond.* back from .*it read"),
        (ByOrder(), "all operations of a reply in the order written"),
        (ByHalves(), "A reply truncated to '<create_memory>.*the operations that are complete"),
        (BySlowness(), "time linear in the length: 25,000 characters of .* took .*400,000"),
        (ByShow(), r"must not look like two: one whose text is 'first\\nm8: second'"),
        (ByDescription(), "leave out an operation .*without 'create'"),
        (ByForm(), "parse must return a list, got tuple"),
        (ByNames(), r"name for each entry shown; of \['m5', 'm12'\] 'm12' has none"),
    ],
)
def test_a_broken_dialect_is_refused(broken: dialects.Dialect, message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_dialect(broken)


# ---------------------------------------------------------------------------------------------------- broken embedders


Change = Callable[[NDArray[np.float32], Sequence[str]], Any]


@dataclass
class Changed:
    """The hashing embedder, its vectors changed before they are returned."""

    change: Change
    name: str = "changed"
    dimension: int = 256

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> Any:
        return self.change(HashingEmbedder(256).embed(texts, kind), texts)


def raising(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
    if "" in texts:
        raise ZeroDivisionError("no words")
    return vectors


def counting_others(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
    mixed = vectors + 1e-3 * vectors.sum(axis=0)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def emptying(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
    texts.clear()  # type: ignore[attr-defined]
    return vectors


def zero_where_blank(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
    return vectors * np.array([[bool(text.strip())] for text in texts], dtype=np.float32).reshape(-1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors, texts: vectors.astype(np.float64), r"float32 array of shape \(0, 256\).*float64"),
        (lambda vectors, texts: vectors.tolist(), "got list"),
        (lambda vectors, texts: vectors[:, :8], r"shape \(0, 256\) for 0 texts .*shape \(0, 8\)"),
        (lambda vectors, texts: vectors if texts else np.zeros(0, np.float32), r"\(0, 256\).*of shape \(0,\)"),
        (lambda vectors, texts: 2 * vectors, "length 1; that of 'Ada lives in Rome.' .* has length 2"),
        (lambda vectors, texts: vectors * np.float32(np.nan), "finite and of length 1.*nan"),
        (zero_where_blank, "that of '' .*has length 0"),
        (lambda vectors, texts: vectors * 0 + np.float32(1 / 16), "Different sentences must have different vectors"),
        (lambda vectors, texts: vectors[::-1], "in the order of the texts; in a batch, 'Ada lives in Rome.' got"),
        (counting_others, "the same vector alone as with .* differs by .* and tolerance is 0"),
        (raising, r"raised ZeroDivisionError: no words"),
        (emptying, "must not change the list"),
    ],
)
def test_a_broken_embedder_is_refused(change: Change, message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_embedder(Changed(change))


def test_an_embedder_that_keeps_its_results_is_refused() -> None:
    results: dict[tuple[str, ...], NDArray[np.float32]] = {}

    def keeping(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
        return results.setdefault(tuple(texts), vectors)

    with pytest.raises(
        AssertionError, match="same vectors again, even after the returned array was changed; they differ by"
    ):
        check_embedder(Changed(keeping))


def test_the_tolerance_of_an_embedder_is_the_users_to_state() -> None:
    def rounding(vectors: NDArray[np.float32], texts: Sequence[str]) -> Any:
        return vectors * np.float32(1 + 1e-6 * len(texts) / 30)

    with pytest.raises(AssertionError, match="tolerance is 0"):
        check_embedder(Changed(rounding))
    check_embedder(Changed(rounding), tolerance=1e-5)


# ------------------------------------------------------------------------------------------------------ broken sources


def hand_made(index: int, seed: int) -> Task:
    from atommem_env.types import Document

    documents = [Document(f"P{number}", f"P{number} lives in town {index}.") for number in range(6)]
    random.Random(f"{index} {seed}").shuffle(documents)
    question = Question("q", "Where does P1 live?", (f"town {index}",), (Evidence("P1", f"town {index}"),), "1hop", 1)
    return Task(f"hand/{index}", "hotpotqa", tuple(documents), (question,))


class Hand:
    """Ten tasks, changed before they are returned."""

    dataset = "hotpotqa"

    def __len__(self) -> int:
        return 10

    def task(self, index: int, seed: int) -> Task:
        if not 0 <= index < 10:
            raise IndexError(index)
        return self.changed(hand_made(index, seed), seed)

    def changed(self, task: Task, seed: int) -> Task:
        return task


class AnyIndex(Hand):
    def task(self, index: int, seed: int) -> Task:
        return hand_made(index % 10, seed)


class SameId(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, id="task")


class Unordered(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, documents=tuple(sorted(task.documents, key=lambda document: document.title)))


class OtherQuestions(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, questions=(replace(task.questions[0], text=f"Where, {seed}?"),))


class NoGold(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, questions=(replace(task.questions[0], answers=()),))


class LooseEvidence(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, questions=(replace(task.questions[0], evidence=(Evidence("P1", "lives there"),)),))


class LostEvidence(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, documents=tuple(document for document in task.documents if document.title != "P1"))


class NoDocuments(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, documents=())


class OtherDataset(Hand):
    def changed(self, task: Task, seed: int) -> Task:
        return replace(task, dataset="musique")


class WithState(Hand):
    def __init__(self) -> None:
        self.made = itertools.count()

    def changed(self, task: Task, seed: int) -> Task:
        random.Random(next(self.made)).shuffle(documents := list(task.documents))
        return replace(task, documents=tuple(documents))


class Unpicklable(Hand):
    def __init__(self) -> None:
        self.key = lambda: None


class PickledToAnother(Hand):
    offset = 0

    def __setstate__(self, state: Any) -> None:
        self.offset = 1

    def __getstate__(self) -> Any:
        return {"a": 1}

    def changed(self, task: Task, seed: int) -> Task:
        return hand_made(int(task.id.split("/")[1]), seed + self.offset)


def test_a_source_made_by_hand_passes() -> None:
    check_task_source(Hand())
    check_task_source(Unordered(), shuffled=False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (AnyIndex, r"task\(-1, 0\) of a source with 10 tasks must raise an IndexError"),
        (SameId, r"must have different ids, .*\['task'\]"),
        (Unordered, "The seed must draw or order the documents"),
        (OtherQuestions, "The index alone must decide a task's id and questions"),
        (NoGold, "question 'q' of task 'hand/0' has no gold"),
        (LooseEvidence, "'lives there' must be a verbatim part of the document 'P1'"),
        (LostEvidence, "evidence in 'P1', but no document has that title"),
        (NoDocuments, "'hand/0' has no document"),
        (OtherDataset, "is of dataset 'musique', but its source is of 'hotpotqa'"),
        (WithState, "must be the same each time"),
        (Unpicklable, "pickling the source raised"),
        (PickledToAnother, "of a pickled copy of the source is another"),
    ],
)
def test_a_broken_source_is_refused(broken: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task_source(broken())


# -------------------------------------------------------------------------------------------------- broken environments


class Wrapped(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, change: Callable[[Any], Any], observed: Callable[[Any], Any] = lambda seen: seen) -> None:
        super().__init__(gym.make("AtomMem-Synthetic", durability="off", num_docs=12))
        self.change, self.observed = change, observed

    def reset(self, **kwargs: Any) -> Any:
        seen, info = self.env.reset(**kwargs)
        return self.observed(seen), info

    def step(self, action: Any) -> Any:
        return self.env.step(self.change(action))


def encoded(action: str) -> str:
    return action.encode().decode()


def same(value: Any) -> Any:
    return value


def blank(seen: Any) -> Any:
    return {name: "" if isinstance(value, str) else 0 for name, value in seen.items()}


def dated(seen: Any) -> Any:
    return seen | {"notice": str(random.random())}


@pytest.mark.parametrize(
    ("change", "observed", "message"),
    [
        (encoded, same, r"step\('\\ud800'\) raised UnicodeEncodeError"),
        (same, dated, "The same seed must give the same episode"),
        (same, blank, "Another seed must give another task"),
        (lambda action: action, same, "pickling the environment raised"),
    ],
)
def test_a_broken_environment_is_refused(change: Any, observed: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_env(Wrapped(change, observed))


def test_what_gymnasium_warns_of_is_refused() -> None:
    from atommem_env.env import AtomMemEnv

    class Shouting(AtomMemEnv):
        def reset(self, **kwargs: Any) -> Any:
            seen, info = super().reset(**kwargs)
            return list(seen.values()), info

    with pytest.raises(AssertionError):
        check_env(Shouting("synthetic", durability="off"))


def test_an_operation_kind_of_ones_own_is_no_operation() -> None:
    class Odd(TagsDialect):
        def parse(self, reply: str) -> Any:
            return [*super().parse(reply), *([Operation("think", reply)] if "😀" * 1000 in reply else [])]  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match="parse must return items that are Operation"):
        check_dialect(Odd())
