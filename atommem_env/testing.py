"""Checkers for parts of your own: a dialect, an embedder, a task source or an environment, each in three lines;
that of a policy is `agents.testing.check_policy`.

    from atommem_env.testing import check_dialect
    def test_my_dialect():
        check_dialect(MyDialect())

Each returns nothing, or raises an `AssertionError` with a sentence that says what is wrong. They need no test runner. What is
drawn is drawn from a fixed seed. They check the form and the promises of the protocols, not whether a part is any good.
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
from atommem_env.tasks.files import UNGRADED
from atommem_env.types import (
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

# What a model may well write into an entry: every dialect must hold it.
_TEXTS = (
    "Ada lives in Rome.",
    "m3: two: colons, m4",
    "first line\nsecond line\n\nfourth",
    "She said \"no\", and 'yes'; 1 < 2 > 0 & {so on} [1, 2] \\ %s {0}",
    '{"name": "x", "arguments": {"id": "m1"}}',
    "日本語 Zürich naïve 😀 \u2028 e\u0301",
    "long " * 500 + "end",
)
_NASTY = (
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
def doing(what: str) -> Iterator[None]:
    """An exception of the part under test becomes an AssertionError that says what was asked of it."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- dialect


def check_dialect(dialect: Dialect) -> None:
    """Checks an `atommem_env.dialects.Dialect`, in a few seconds.

    - What it writes it reads back, every operation with every ordinary text, alone, amid prose and among others, in order.
    - It reads any text without raising. Of a reply that was cut it reads the operations that were complete, and no others.
    - Reading takes time in proportion to the length.
    - The entries shown can be named, and no entry's text can pass for two entries.
    - The description changes with each operation that the settings take away.

    Raises:
        AssertionError: it does not; the message says how.
    """
    require(isinstance(dialect.name, str) and bool(dialect.name), f"name must be a text, got {dialect.name!r}.")
    operations = _check_round_trips(dialect)
    written = [dialect.write(operation) for operation in operations]
    _check_cuts(dialect, operations, written)
    rng = random.Random(0)
    pieces = [piece for text in written for piece in re.findall(r"\w+|\W", text)]
    drawn = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(300)]
    for text in (*_NASTY, *drawn):
        _parsed(dialect, text)
    _check_show(dialect)
    _check_description(dialect)
    _check_linear(dialect)


def _parsed(dialect: Dialect, reply: str) -> list[Operation | OperationResult]:
    """What the dialect reads in `reply`, found to have the right form."""
    with doing(f"parse({_short(reply)})"):
        found = dialect.parse(reply)
    require(isinstance(found, list), f"parse must return a list, got {type(found).__name__} for {_short(reply)}.")
    for item in found:
        if isinstance(item, Operation):
            ok = isinstance(item.kind, OperationKind) and isinstance(item.text, str) and isinstance(item.target, str)
        else:
            ok = isinstance(item, OperationResult) and item.fault is not None and bool(item.detail)
        require(
            ok,
            "parse must return items that are Operation, or OperationResult with a fault and a detail for the policy; "
            f"got {item!r} for {_short(reply)}.",
        )
    return found


def _check_round_trips(dialect: Dialect) -> list[Operation]:
    """Returns an operation of each kind, with a target as the dialect writes it."""
    target = _target(dialect, ["m5", "m12"], "m12")
    ordinary = []
    for kind in OperationKind:
        named = target if kind in (OperationKind.UPDATE, OperationKind.DELETE) else ""
        for text in ("",) if kind is OperationKind.DELETE else _TEXTS:
            operation = Operation(kind, text, named)
            with doing(f"write({operation})"):
                written = dialect.write(operation)
            for reply in (written, f"I think that this helps.\n{written}\nSo far so good."):
                found = _parsed(dialect, reply)
                require(
                    found == [operation], f"parse must read {operation} back from {_short(reply)}, it read {found}."
                )
        ordinary.append(Operation(kind, "" if kind is OperationKind.DELETE else "Ada lives in Rome.", named))
    together = "\n".join(map(dialect.write, ordinary))
    require(
        _parsed(dialect, together) == ordinary,
        f"parse must read all operations of a reply in the order written, from {_short(together)} it read "
        f"{_parsed(dialect, together)}.",
    )
    return ordinary


def _target(dialect: Dialect, shown: Sequence[str], entry_id: str) -> str:
    """How the dialect names an entry that is shown: by its id, or by its place."""
    places = [str(place) for place in range(len(shown) + 1)]
    for target in ("", "m999", "-1", "1" * 5000, "x\ny", *places):
        for ids in (shown, []):
            with doing(f"entry_id({_short(target)}, {list(ids)})"):
                meant = dialect.entry_id(target, ids)
            require(isinstance(meant, str), f"entry_id must return a text, got {meant!r} for {_short(target)}.")
    for target in (entry_id, *places):
        if dialect.entry_id(target, shown) == entry_id:
            return target
    raise AssertionError(f"entry_id must have a name for each entry shown; of {list(shown)} {entry_id!r} has none.")


def _check_cuts(dialect: Dialect, operations: Sequence[Operation], written: Sequence[str]) -> None:
    whole = "\n".join(written)
    ends = [len("\n".join(written[: place + 1])) for place in range(len(written))]
    for cut in range(len(whole)):
        found = [item for item in _parsed(dialect, whole[:cut]) if isinstance(item, Operation)]
        complete = sum(end <= cut for end in ends)
        # The last mark of an operation may be one that it does not need.
        require(
            found in (list(operations[:complete]), list(operations[: complete + 1])),
            f"A reply that was cut to {_short(whole[:cut])} must be read as the operations that are complete, it was read "
            f"as {found}.",
        )


def _check_linear(dialect: Dialect) -> None:
    before, _, after = dialect.write(Operation(OperationKind.ANSWER, "zebra")).partition("zebra")
    marks = dialect.write(Operation(OperationKind.CREATE, "zebra")).partition("zebra")
    short, long = 25_000, 400_000

    def seconds(reply: str) -> float:
        start = time.thread_time()  # of the processor: a busy machine must not fail a dialect
        dialect.parse(reply)
        return time.thread_time() - start

    for piece in filter(None, (*marks, "".join(marks), "\\boxed{", "{", "[", "<", '"', "\\", " ")):
        for start, end in (("", ""), (before, after)):
            replies = [start + piece * (length // len(piece)) + end for length in (short, long)]
            quick, slow = (min(seconds(reply) for _ in range(3)) for reply in replies)
            # In proportion it is 16 times, by the square 256 times.
            require(
                slow < 64 * max(quick, 1e-3),
                f"parse must take time in proportion to the length: {short:,} characters of {_short(start + piece)} took "
                f"{quick:.4f} s, {long:,} took {slow:.2f} s.",
            )


def _check_show(dialect: Dialect) -> None:
    def show(*entries: Entry) -> str:
        with doing(f"show({entries})"):
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
                f"An entry must not pass for two: one whose text is {inside!r} is shown just as two entries are. Indent the "
                "lines that continue an entry, for example.",
            )


def _check_description(dialect: Dialect) -> None:
    whole = EpisodeSettings()
    with doing("describe(EpisodeSettings())"):
        full = dialect.describe(whole)
    require(isinstance(full, str) and bool(full.strip()), f"describe must return a text, got {full!r}.")
    for name in whole.operations:
        fewer = EpisodeSettings(operations=tuple(other for other in whole.operations if other != name))
        require(
            len(dialect.describe(fewer)) < len(full),
            f"describe must leave out an operation that the settings do not allow; without {name!r} it says as much.",
        )
    require(
        len(dialect.describe(EpisodeSettings(scratchpad=False))) < len(full),
        "describe must leave the scratchpad out where the settings have none.",
    )


# ------------------------------------------------------------------------------------------------------------- embedder


def check_embedder(embedder: Embedder, *, tolerance: float = 0.0) -> None:
    """Checks an `atommem_env.embedders.Embedder`.

    - One finite float32 vector of length 1 (within 1e-5) for any text, in order, in a new array [texts, D]; [0, D] for none.
    - A text has the same vector each time, alone and beside others.
    - Different sentences have different vectors. Both kinds, "document" and "query", are known.

    Args:
        tolerance: by how much a number of a vector may differ with the texts that it is embedded with. 0: bit for bit. A
            service, or a GPU, rarely keeps that; 1e-3 leaves retrieval as it is, but for near-ties.

    Raises:
        AssertionError: it does not; the message says how.
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
        nothing = _vectors(embedder, [], kind)
        together = _vectors(embedder, texts, kind)
        kept = together.copy()
        require(
            len({row.tobytes() for row in kept[: len(sentences)]}) > 1,
            f"Different sentences must have different vectors; {sentences} all have the same ({kind}).",
        )
        if together.flags.writeable:
            together[:] = 0  # a caller may
        with doing(f"embedding {len(texts)} texts again ({kind})"):
            off = np.abs(embedder.embed(list(texts), kind) - kept).max()
        require(
            bool(off <= tolerance),
            f"The same texts must have the same vectors again, whatever was done to the array before; they differ by {off:.1e}, "
            f"and tolerance is {tolerance:g} ({kind}).",
        )
        alone = np.concatenate([nothing, *(_vectors(embedder, [text], kind) for text in texts)])
        for place, text in enumerate(texts[: len(sentences)]):
            near = int(np.argmax(alone[: len(sentences)] @ kept[place]))
            require(
                near == place,
                f"Vectors must come in the order of the texts; beside others, {text!r} got that of {texts[near]!r} ({kind}).",
            )
        _same(alone, kept, texts, tolerance, f"alone as beside {len(texts) - 1} others ({kind})")
        order = random.Random(0).sample(range(len(texts)), len(texts))
        again = _vectors(embedder, [texts[place] for place in order], kind)
        _same(again, kept[order], [texts[place] for place in order], tolerance, f"in whatever order ({kind})")


def _vectors(embedder: Embedder, texts: list[str], kind: EmbeddingKind) -> np.ndarray:
    """The vectors of `texts`, found to have the right form."""
    given = list(texts)
    about = f"{len(texts)} texts" if len(texts) != 1 else _short(texts[0])
    with doing(f"embed of {about} ({kind})"):
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
            f"Vectors must be finite and of length 1; that of {_short(text)} ({kind}) has length {length:.6g}.",
        )
    return vectors


def _same(one: np.ndarray, other: np.ndarray, texts: Sequence[str], tolerance: float, when: str) -> None:
    off = np.abs(one - other).max(axis=1)
    place = int(np.argmax(off))
    require(
        bool(off[place] <= tolerance),
        f"A text must have the same vector {when}; that of {_short(texts[place])} differs by {off[place]:.1e}, and tolerance is "
        f"{tolerance:g}.",
    )


# ---------------------------------------------------------------------------------------------------------- task source


def check_task_source(source: TaskSource, *, shuffled: bool = True) -> None:
    """Checks an `atommem_env.types.TaskSource` by five of its tasks, the first and the last among them.

    - The same index and seed give the same task: again, in any order, and from a pickled copy. Ids differ by index.
    - An index out of range is an IndexError or a ValueError.
    - A task has documents and questions, and each question a gold answer that its dataset's rule gives a full score.
    - Evidence stands verbatim in a document of its title.
    - Another seed asks the same questions, over documents in another order.

    Args:
        shuffled: whether the seed orders the documents; False for a source whose order is part of the data.

    Raises:
        AssertionError: it does not; the message says how.
    """
    count = len(source)
    require(count >= 1, f"A source must have at least one task, len() is {count}.")
    indices = sorted({0, count - 1, *random.Random(0).sample(range(count), min(count, 3))})
    tasks = {}
    for index in indices:
        with doing(f"task({index}, 1)"):
            tasks[index] = source.task(index, 1)
        with doing(f"checking task({index}, 1)"):
            _check_task(tasks[index], source.dataset)
    ids = {task.id for task in tasks.values()}
    require(
        len(ids) == len(tasks), f"Tasks of different indices must have different ids, {indices} have {sorted(ids)}."
    )
    with doing("pickling the source"):
        copy = pickle.loads(pickle.dumps(source))
    moved = 0
    for index in reversed(indices):
        other = source.task(index, 2)
        require(
            other.questions == tasks[index].questions and other.id == tasks[index].id,
            f"The index alone must decide a task's id and questions; those of task({index}, …) change with the seed.",
        )
        moved += other.documents != tasks[index].documents
        require(source.task(index, 1) == tasks[index], f"task({index}, 1) must be the same each time, it is not.")
        require(copy.task(index, 1) == tasks[index], f"task({index}, 1) of a pickled copy of the source is another.")
    require(
        not shuffled or moved > 0 or all(len(task.documents) == 1 for task in tasks.values()),
        f"The seed must draw or order the documents; with the seeds 1 and 2 those of the tasks {indices} are the same.",
    )
    for index in (-1, count):
        try:
            source.task(index, 0)
        except (IndexError, ValueError):
            continue
        raise AssertionError(f"task({index}, 0) of a source with {count} tasks must be an IndexError or a ValueError.")


def _check_task(task: Task, dataset: str) -> None:
    require(isinstance(task, Task), f"task() must return an atommem_env.types.Task, got {type(task).__name__}.")
    about = f"task {task.id!r}"
    require(bool(task.id) and isinstance(task.id, str), f"A task must have an id, got {task.id!r}.")
    require(task.dataset == dataset, f"{about} is of dataset {task.dataset!r}, and its source of {dataset!r}.")
    require(bool(task.documents), f"{about} has no document.")
    require(bool(task.questions), f"{about} has no question.")
    for document in task.documents:
        for text in (document.title, document.text):
            require(isinstance(text, str), f"Titles and texts must be text, {about} has {text!r}.")
            require(
                not re.search("[\x00\ud800-\udfff]", text), f"{about} has NUL or a lone surrogate in {_short(text)}."
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
            require(bool(holders), f"{about} has evidence in {evidence.title!r}, and no document has that title.")
            require(
                bool(evidence.text) and any(evidence.text in text for text in holders),
                f"{about}: the evidence {_short(evidence.text)} must stand verbatim in the document {evidence.title!r}.",
            )


# ---------------------------------------------------------------------------------------------------------- environment


def check_env(env: gym.Env[Any, Any]) -> None:
    """Checks an environment of ours, or one made of it by wrappers; it is stepped, and left open.

    - Gymnasium's own checker has nothing to say about it, not even a warning.
    - The same seed gives the same observations, rewards and infos: again, and from a pickled copy.
    - Any text is a legal action.

    Raises:
        AssertionError: it does not; the message says how.
    """
    # It also renders for people.
    with doing("gymnasium's check_env"), warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)
    first = _steps(env, 5)
    require(_steps(env, 5) == first, "The same seed must give the same episode; with seed 5 it is another each time.")
    require(
        _steps(env, 6)[0][0] != first[0][0], "Another seed must give another task; 5 and 6 give the same observation."
    )
    with doing("pickling the environment"):
        copy = pickle.loads(pickle.dumps(env))
    require(_steps(copy, 5) == first, "A pickled copy of the environment must play the same; with seed 5 it does not.")
    copy.close()


def _steps(env: gym.Env[Any, Any], seed: int) -> list[Any]:
    """Everything that `reset` and steps with nasty actions return."""
    seen: list[Any] = [env.reset(seed=seed)]
    require(env.observation_space.contains(seen[0][0]), "The observation after reset is not in the space.")
    for action in _NASTY:
        with doing(f"step({_short(action)})"):
            observation, reward, terminated, truncated, info = env.step(action)
        about = f"after step({_short(action)})"
        require(env.observation_space.contains(observation), f"The observation {about} is not in the space.")
        require(math.isfinite(reward), f"The reward {about} is {reward}.")
        seen.append((observation, reward, terminated, truncated, info))
        if terminated or truncated:
            seen.append(env.reset())
    return seen


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}… ({len(text)} characters)"
