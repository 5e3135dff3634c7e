"""Checkers for your own parts: a dialect, an embedder, a task source or an environment, each in three lines;
that of a policy is `agents.testing.check_policy`.

    from atommem_env.testing import check_dialect
    def test_my_dialect():
        check_dialect(MyDialect())

Each returns nothing, or raises an `AssertionError` with a sentence that says what is wrong. They need no test runner, and draw
random inputs from a fixed seed. They check the form and the guarantees of the protocols, not the quality of a part.
"""

from __future__ import annotations

import math
import pickle
import random
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, get_args

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from atommem_env.dialects import Dialect
from atommem_env.embedders import Embedder
from atommem_env.scoring import rule_of, score
from atommem_env.types import (
    UNGRADED,
    EmbeddingKind,
    Entry,
    EpisodeSettings,
    Operation,
    OperationKind,
    OperationResult,
    Task,
    TaskSource,
)

__all__ = ["check_dialect", "check_embedder", "check_env", "check_task_source"]

# Ordinary texts of entries, which every dialect must represent.
_TEXTS = (
    "Ada lives in Rome.",
    "m3: two: colons, m4",
    "first line\nsecond line\n\nfourth",
    "She said \"no\", and 'yes'; 1 < 2 > 0 & {so on} [1, 2] \\ %s {0}",
    '{"name": "x", "arguments": {"id": "m1"}}',
    "日本語 Zürich naïve 😀 \u2028 e\u0301",
    "long " * 500 + "end",
)
_ADVERSARIAL = (
    *("", " ", "\n", "\x00", "\ud800", "\udfff\ud83d", "\ufeff", "\u202eabc", "a" * 100_000, "😀" * 1000),
    *("<", ">", "</", "<>", "<" * 5000, "{", "}" * 99, "[" * 100_000, '{"a":' * 20_000, '"', "\\", "\\u", "\\ud800"),
    *("1" * 5000, "-1e999999", "NaN", "null", "true", "[]", "{}", "[null]", "[[1], {}]", "<!--", "]]>", "&lt;", "%s%n"),
    *(
        "<think>",
        "</think>",
        "<think></think>",
        "```json\n{}\n```",
        "<|im_end|>",
        "\\boxed{",
        "\\boxed{}}}",
        "()" * 999,
    ),
)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise AssertionError(message)


@contextmanager
def describe_errors(call: str) -> Iterator[None]:
    """Converts an exception of the part under test into an AssertionError that names the call."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{call} raised {type(error).__name__}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- dialect


def check_dialect(dialect: Dialect) -> None:
    """Checks an `atommem_env.dialects.Dialect`, in a few seconds.

    - It parses what it writes: every operation with every ordinary text, alone, within prose and among others, in order.
    - It parses any text without raising. From a truncated reply it parses the complete operations, and no others.
    - Parsing takes time linear in the length.
    - The entries shown can be referred to, and no entry's text can look like two entries.
    - The description omits each operation that the settings exclude.

    Raises:
        AssertionError: a check failed; the message says how.
    """
    require(isinstance(dialect.name, str) and bool(dialect.name), f"name must be a text, got {dialect.name!r}.")
    operations = _check_round_trips(dialect)
    written = [dialect.write(operation) for operation in operations]
    _check_truncation(dialect, operations, written)
    rng = random.Random(0)
    pieces = [piece for text in written for piece in re.findall(r"\w+|\W", text)]
    drawn = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(300)]
    for text in (*_ADVERSARIAL, *drawn):
        _parse(dialect, text)
    _check_show(dialect)
    _check_description(dialect)
    _check_linear(dialect)


def _parse(dialect: Dialect, reply: str) -> list[Operation | OperationResult]:
    """What the dialect parses `reply` into, with its form checked."""
    with describe_errors(f"parse({_shorten(reply)})"):
        parsed = dialect.parse(reply)
    require(isinstance(parsed, list), f"parse must return a list, got {type(parsed).__name__} for {_shorten(reply)}.")
    for item in parsed:
        if isinstance(item, Operation):
            ok = isinstance(item.kind, OperationKind) and isinstance(item.text, str) and isinstance(item.target, str)
        else:
            ok = isinstance(item, OperationResult) and item.fault is not None and bool(item.detail)
        require(
            ok,
            "parse must return items that are Operation, or OperationResult with a fault and a detail for the policy; "
            f"got {item!r} for {_shorten(reply)}.",
        )
    return parsed


def _check_round_trips(dialect: Dialect) -> list[Operation]:
    """Returns an operation of each kind, with a target as the dialect writes it."""
    target = _find_target(dialect, ["m5", "m12"], "m12")
    ordinary = []
    for kind in OperationKind:
        named = target if kind in (OperationKind.UPDATE, OperationKind.DELETE) else ""
        for text in ("",) if kind is OperationKind.DELETE else _TEXTS:
            operation = Operation(kind, text, named)
            with describe_errors(f"write({operation})"):
                written = dialect.write(operation)
            for reply in (written, f"I think that this helps.\n{written}\nSo far so good."):
                parsed = _parse(dialect, reply)
                require(
                    parsed == [operation],
                    f"parse must read {operation} back from {_shorten(reply)}, it read {parsed}.",
                )
        ordinary.append(Operation(kind, "" if kind is OperationKind.DELETE else "Ada lives in Rome.", named))
    together = "\n".join(map(dialect.write, ordinary))
    require(
        _parse(dialect, together) == ordinary,
        f"parse must read all operations of a reply in the order written, from {_shorten(together)} it read "
        f"{_parse(dialect, together)}.",
    )
    return ordinary


def _find_target(dialect: Dialect, shown: Sequence[str], entry_id: str) -> str:
    """The target by which the dialect refers to an entry that is shown: its id, or its index."""
    indices = [str(index) for index in range(len(shown) + 1)]
    for target in ("", "m999", "-1", "1" * 5000, "x\ny", *indices):
        for ids in (shown, []):
            with describe_errors(f"entry_id({_shorten(target)}, {list(ids)})"):
                referent = dialect.entry_id(target, ids)
            require(isinstance(referent, str), f"entry_id must return a text, got {referent!r} for {_shorten(target)}.")
    for target in (entry_id, *indices):
        if dialect.entry_id(target, shown) == entry_id:
            return target
    raise AssertionError(f"entry_id must have a name for each entry shown; of {list(shown)} {entry_id!r} has none.")


def _check_truncation(dialect: Dialect, operations: Sequence[Operation], written: Sequence[str]) -> None:
    whole = "\n".join(written)
    ends = [len("\n".join(written[: index + 1])) for index in range(len(written))]
    for length in range(len(whole)):
        parsed = [item for item in _parse(dialect, whole[:length]) if isinstance(item, Operation)]
        complete = sum(end <= length for end in ends)
        # The last character of an operation may be optional.
        require(
            parsed in (list(operations[:complete]), list(operations[: complete + 1])),
            f"A reply truncated to {_shorten(whole[:length])} must be read as the operations that are complete, it was read as "
            f"{parsed}.",
        )


def _check_linear(dialect: Dialect) -> None:
    before, _, after = dialect.write(Operation(OperationKind.ANSWER, "zebra")).partition("zebra")
    marks = dialect.write(Operation(OperationKind.CREATE, "zebra")).partition("zebra")
    short, long = 25_000, 400_000

    def seconds(reply: str) -> float:
        start = time.thread_time()  # processor time: a busy machine must not fail a dialect
        dialect.parse(reply)
        return time.thread_time() - start

    for piece in filter(None, (*marks, "".join(marks), "\\boxed{", "{", "[", "<", '"', "\\", " ")):
        for start, end in (("", ""), (before, after)):
            replies = [start + piece * (length // len(piece)) + end for length in (short, long)]
            quick, slow = (min(seconds(reply) for _ in range(3)) for reply in replies)
            # Linear time takes 16 times as long, quadratic time 256 times.
            require(
                slow < 64 * max(quick, 1e-3),
                f"parse must take time linear in the length: {short:,} characters of {_shorten(start + piece)} took "
                f"{quick:.4f} s, {long:,} took {slow:.2f} s.",
            )


def _check_show(dialect: Dialect) -> None:
    def show(*entries: Entry) -> str:
        with describe_errors(f"show({entries})"):
            shown = dialect.show(entries)
        require(isinstance(shown, str), f"show must return a text, got {shown!r}.")
        return shown

    show()
    one, two = Entry("m7", "first"), Entry("m8", "second")
    both = show(one, two)
    require(
        "first" in both and "second" in both.partition("first")[2],
        f"show must hold the text of each entry, best first; for 'first' and 'second' it is {both!r}.",
    )
    before, _, after = show(one).partition("first")
    if both.startswith(before) and both.endswith(after):
        inside = both[len(before) : len(both) - len(after)]
        for line_break in ("\n", "\r\n", "\r", "\u2028"):
            forged = show(Entry("m7", inside.replace("\n", line_break)))
            require(
                forged.splitlines() != both.splitlines(),
                f"An entry must not look like two: one whose text is {inside!r} is shown exactly as two entries are. Indent "
                "continuation lines, for example.",
            )


def _check_description(dialect: Dialect) -> None:
    whole = EpisodeSettings()
    with describe_errors("describe(EpisodeSettings())"):
        full = dialect.describe(whole)
    require(isinstance(full, str) and bool(full.strip()), f"describe must return a text, got {full!r}.")
    for name in whole.operations:
        fewer = EpisodeSettings(operations=tuple(other for other in whole.operations if other != name))
        require(
            len(dialect.describe(fewer)) < len(full),
            f"describe must leave out an operation that the settings do not allow; without {name!r} it is no shorter.",
        )
    require(
        len(dialect.describe(EpisodeSettings(scratchpad=False))) < len(full),
        "describe must leave the scratchpad out where the settings have none.",
    )


# ------------------------------------------------------------------------------------------------------------- embedder


def check_embedder(embedder: Embedder, *, tolerance: float = 0.0) -> None:
    """Checks an `atommem_env.embedders.Embedder`.

    - One finite float32 vector of length 1 (within 1e-5) for any text, in order, in a new array [texts, D]; [0, D] for none.
    - A text has the same vector each time, alone and in a batch.
    - Different sentences have different vectors. Both kinds, "document" and "query", are supported.

    Args:
        tolerance: by how much a number of a vector may differ between batches. 0: bit for bit. A service, or a GPU, rarely
            achieves that; 1e-3 changes retrieval only in near-ties.

    Raises:
        AssertionError: a check failed; the message says how.
    """
    dimension = embedder.dimension
    require(isinstance(embedder.name, str) and bool(embedder.name), f"name must be a text, got {embedder.name!r}.")
    require(
        isinstance(dimension, int) and dimension >= 1, f"dimension must be a whole number above 0, got {dimension!r}."
    )
    sentences = ["Ada lives in Rome.", "Boats are painted each spring, by the lake, in blue.", "Who leads the company?"]
    odd = ["", " ", "\n", "!?", "…", "the", "日本語", "😀", "\ufffd", "x" * 300, "word " * 20_000, *_TEXTS]
    texts = sentences + odd + sentences
    for kind in get_args(EmbeddingKind):
        nothing = _embed(embedder, [], kind)
        together = _embed(embedder, texts, kind)
        expected = together.copy()
        require(
            len({row.tobytes() for row in expected[: len(sentences)]}) > 1,
            f"Different sentences must have different vectors; {sentences} all have the same ({kind}).",
        )
        if together.flags.writeable:
            together[:] = 0  # a caller may
        with describe_errors(f"embedding {len(texts)} texts again ({kind})"):
            difference = np.abs(embedder.embed(list(texts), kind) - expected).max()
        require(
            bool(difference <= tolerance),
            f"The same texts must have the same vectors again, even after the returned array was changed; they differ by "
            f"{difference:.1e}, and tolerance is {tolerance:g} ({kind}).",
        )
        alone = np.concatenate([nothing, *(_embed(embedder, [text], kind) for text in texts)])
        for index, text in enumerate(texts[: len(sentences)]):
            nearest = int(np.argmax(alone[: len(sentences)] @ expected[index]))
            require(
                nearest == index,
                f"Vectors must come in the order of the texts; in a batch, {text!r} got that of {texts[nearest]!r} ({kind}).",
            )
        _check_equal(alone, expected, texts, tolerance, f"alone as with {len(texts) - 1} others ({kind})")
        order = random.Random(0).sample(range(len(texts)), len(texts))
        reordered = _embed(embedder, [texts[index] for index in order], kind)
        _check_equal(reordered, expected[order], [texts[index] for index in order], tolerance, f"in any order ({kind})")


def _embed(embedder: Embedder, texts: list[str], kind: EmbeddingKind) -> np.ndarray:
    """The vectors of `texts`, with their form checked."""
    given = list(texts)
    about = f"{len(texts)} texts" if len(texts) != 1 else _shorten(texts[0])
    with describe_errors(f"embed of {about} ({kind})"):
        vectors = embedder.embed(given, kind)
    require(given == texts, f"embed must not change the list of texts that it is given ({kind}).")
    expected = (len(texts), embedder.dimension)
    require(
        isinstance(vectors, np.ndarray) and vectors.shape == expected and vectors.dtype == np.float32,
        f"embed must return a float32 array of shape {expected} for {about} ({kind}), got {type(vectors).__name__} of shape "
        f"{np.shape(vectors)} and dtype {getattr(vectors, 'dtype', None)}.",
    )
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for text, length in zip(texts, lengths.tolist(), strict=True):
        require(
            abs(length - 1) <= 1e-5,
            f"Vectors must be finite and of length 1; that of {_shorten(text)} ({kind}) has length {length:.6g}.",
        )
    return vectors


def _check_equal(one: np.ndarray, other: np.ndarray, texts: Sequence[str], tolerance: float, when: str) -> None:
    differences = np.abs(one - other).max(axis=1)
    worst = int(np.argmax(differences))
    require(
        bool(differences[worst] <= tolerance),
        f"A text must have the same vector {when}; that of {_shorten(texts[worst])} differs by {differences[worst]:.1e}, and "
        f"tolerance is {tolerance:g}.",
    )


# ---------------------------------------------------------------------------------------------------------- task source


def check_task_source(source: TaskSource, *, shuffled: bool = True) -> None:
    """Checks an `atommem_env.types.TaskSource` on up to five of its tasks, the first and the last among them.

    - The same index and seed give the same task: again, in any order, and from a pickled copy. Ids differ by index.
    - An index out of range raises an IndexError or a ValueError.
    - A task has documents and questions, and each question a gold answer that its dataset's rule gives a full score.
    - Evidence is a verbatim part of a document with its title.
    - Another seed asks the same questions, over documents in another order.

    Args:
        shuffled: whether the seed orders the documents; False for a source whose order is part of the data.

    Raises:
        AssertionError: a check failed; the message says how.
    """
    count = len(source)
    require(count >= 1, f"A source must have at least one task, len() is {count}.")
    indices = sorted({0, count - 1, *random.Random(0).sample(range(count), min(count, 3))})
    tasks = {}
    for index in indices:
        with describe_errors(f"task({index}, 1)"):
            tasks[index] = source.task(index, 1)
        with describe_errors(f"checking task({index}, 1)"):
            _check_task(tasks[index], source.dataset)
    ids = {task.id for task in tasks.values()}
    require(
        len(ids) == len(tasks), f"Tasks of different indices must have different ids, {indices} have {sorted(ids)}."
    )
    with describe_errors("pickling the source"):
        copy = pickle.loads(pickle.dumps(source))
    reordered = 0
    for index in reversed(indices):
        other = source.task(index, 2)
        require(
            other.questions == tasks[index].questions and other.id == tasks[index].id,
            f"The index alone must decide a task's id and questions; those of task({index}, …) change with the seed.",
        )
        reordered += other.documents != tasks[index].documents
        require(source.task(index, 1) == tasks[index], f"task({index}, 1) must be the same each time, it is not.")
        require(copy.task(index, 1) == tasks[index], f"task({index}, 1) of a pickled copy of the source is another.")
    require(
        not shuffled or reordered > 0 or all(len(task.documents) == 1 for task in tasks.values()),
        f"The seed must draw or order the documents; with the seeds 1 and 2 those of the tasks {indices} are the same.",
    )
    for index in (-1, count):
        try:
            source.task(index, 0)
        except (IndexError, ValueError):
            continue
        raise AssertionError(
            f"task({index}, 0) of a source with {count} tasks must raise an IndexError or a ValueError."
        )


def _check_task(task: Task, dataset: str) -> None:
    require(isinstance(task, Task), f"task() must return an atommem_env.types.Task, got {type(task).__name__}.")
    about = f"task {task.id!r}"
    require(bool(task.id) and isinstance(task.id, str), f"A task must have an id, got {task.id!r}.")
    require(task.dataset == dataset, f"{about} is of dataset {task.dataset!r}, but its source is of {dataset!r}.")
    require(bool(task.documents), f"{about} has no document.")
    require(bool(task.questions), f"{about} has no question.")
    for document in task.documents:
        for text in (document.title, document.text):
            require(isinstance(text, str), f"Titles and texts must be text, {about} has {text!r}.")
            require(
                not re.search("[\x00\ud800-\udfff]", text), f"{about} has NUL or a lone surrogate in {_shorten(text)}."
            )
        require(bool(document.text.strip()), f"{about} has a document without text, {document.title!r}.")
    for question in task.questions:
        about = f"question {question.id!r} of task {task.id!r}"
        require(bool(question.id), f"A question of task {task.id!r} has no id.")
        require(bool(question.text.strip()), f"{about} is blank.")
        golds = isinstance(question.answers, tuple) and (bool(question.answers) or question.kind == UNGRADED)
        require(golds, f"{about} has no gold answers, and is not of the kind {UNGRADED!r}.")
        for gold in question.answers:
            reached = score(gold, question.answers, rule_of(task)).em
            require(bool(gold.strip()) and reached == 1.0, f"{about}: the gold {gold!r} scores {reached}.")
        for evidence in question.evidence:
            holders = [document.text for document in task.documents if document.title == evidence.title]
            require(bool(holders), f"{about} has evidence in {evidence.title!r}, but no document has that title.")
            require(
                bool(evidence.text) and any(evidence.text in text for text in holders),
                f"{about}: the evidence {_shorten(evidence.text)} must be a verbatim part of the document {evidence.title!r}.",
            )


# ---------------------------------------------------------------------------------------------------------- environment


def check_env(env: gym.Env[Any, Any]) -> None:
    """Checks an AtomMem environment, wrapped or not; it is stepped, and left open.

    - Gymnasium's own checker passes without a warning.
    - The same seed gives the same observations, rewards and infos: again, and from a pickled copy.
    - Any text is a legal action.

    Raises:
        AssertionError: a check failed; the message says how.
    """
    # Gymnasium's checker also renders to the standard output.
    with describe_errors("gymnasium's check_env"), warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)
    first = _play(env, 5)
    require(_play(env, 5) == first, "The same seed must give the same episode; with seed 5 it is another each time.")
    require(
        _play(env, 6)[0][0] != first[0][0], "Another seed must give another task; 5 and 6 give the same observation."
    )
    with describe_errors("pickling the environment"):
        copy = pickle.loads(pickle.dumps(env))
    require(_play(copy, 5) == first, "A pickled copy of the environment must play the same; with seed 5 it does not.")
    copy.close()


def _play(env: gym.Env[Any, Any], seed: int) -> list[Any]:
    """Everything that `reset` and steps with adversarial actions return."""
    returned: list[Any] = [env.reset(seed=seed)]
    require(env.observation_space.contains(returned[0][0]), "The observation after reset is not in the space.")
    for action in _ADVERSARIAL:
        with describe_errors(f"step({_shorten(action)})"):
            observation, reward, terminated, truncated, info = env.step(action)
        about = f"after step({_shorten(action)})"
        require(env.observation_space.contains(observation), f"The observation {about} is not in the space.")
        require(math.isfinite(reward), f"The reward {about} is {reward}.")
        returned.append((observation, reward, terminated, truncated, info))
        if terminated or truncated:
            returned.append(env.reset())
    return returned


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}… ({len(text)} characters)"
