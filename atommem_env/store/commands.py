"""The commands `atommem memory ls`, `show`, `at-step`, `search` and `export`: the content of a store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atommem_env.embedders import embed, get_embedder
from atommem_env.errors import SettingError, StoreError
from atommem_env.memory import WorkingMemory
from atommem_env.paths import replacing
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord
from atommem_env.store.tables import TABLES
from atommem_env.terminal import printable
from atommem_env.types import EmbeddingRequest

_ID = 10  # characters of an episode's id that tables show
Store = Annotated[Path, tyro.conf.Positional]
Words = Annotated[str, tyro.conf.Positional]


def ls_command(store: Store, /, *, last: int = 50) -> None:
    """List the episodes of a store, the latest at the end.

    Args:
        store: The store's folder, for example `memory` in a folder that `atommem eval --out` wrote.
        last: How many to list, the latest ones; 0: all.
    """
    opened = _open(store)
    _check(opened)
    records = opened.episodes()
    shown = records[-last:] if last else records
    table = Table(title=_safe(f"{len(shown):,} of {len(records):,} episodes in {store}"), title_justify="left")
    for heading in ("episode", "environment", "task", "status", "reward", "steps", "committed (UTC)"):
        table.add_column(heading, justify="right" if heading in ("reward", "steps") else "left")
    for record in shown:
        table.add_row(*_cells(record), f"{record.committed_at:%Y-%m-%d %H:%M:%S}")
    console = Console()
    console.print(table)
    if shown:
        console.print(_safe(f"Next: atommem memory show {store} {shown[-1].episode_id[:_ID]}"), soft_wrap=True)


def show_command(store: Store, episode: Words, /) -> None:
    """Show an episode: its outcome, its changes to the memory step by step, and the entries at its end.

    Args:
        store: The store's folder.
        episode: The episode's id, or as many of its first characters as no other has.
    """
    opened = _open(store)
    record = _find(opened, episode)
    changes, memory = opened.changes(record.episode_id), opened.memory_at(record.episode_id, record.steps)
    console = Console()
    names = ("episode", "environment", "task", "status", "reward", "replies")
    for name, value in zip(names, (_safe(record.episode_id), *_cells(record)[1:]), strict=True):
        console.print(Text(f"{name:<12}").append(value))
    settings = ", ".join(f"{name} {value}" for name, value in record.settings.items())
    console.print(_safe(f"{'settings':<12}{settings}"))
    table = Table(title="Changes and searches", title_justify="left")
    for heading in ("step", "operation", "entry", "text"):
        table.add_column(heading, justify="right" if heading == "step" else "left")
    for change in changes:
        table.add_row(str(change["step"]), *(_safe(change[name]) for name in ("operation", "entry_id", "text")))
    console.print(table)
    _print_entries(console, memory, "At the end")


def at_step_command(store: Store, episode: Words, step: Annotated[int, tyro.conf.Positional], /) -> None:
    """Show an episode's memory as it was after some replies.

    Args:
        store: The store's folder.
        episode: The episode's id, or its first characters.
        step: After how many replies; 0 is before the first.
    """
    opened = _open(store)
    record = _find(opened, episode)
    _print_entries(Console(), opened.memory_at(record.episode_id, step), f"After {step} of {record.steps} replies")


def search_command(
    store: Store, text: Words, /, *, embedder: str = "hashing", k: int = 10, episode: str | None = None
) -> None:
    """Search the entries at the end of episodes by meaning: exact search, by cosine similarity.

    Args:
        store: The store's folder.
        text: What to search for.
        embedder: The embedder that the store was made with: "hashing", "minilm", "st:MODEL", "openai:MODEL".
        k: How many entries to show.
        episode: Search in one episode alone: its id, or its first characters.
    """
    opened = _open(store)
    episode_id = None if episode is None else _find(opened, episode).episode_id
    if episode_id is None:
        _check(opened)
    vector = embed(get_embedder(embedder), [EmbeddingRequest(text, "query")])[0]
    table = Table()
    for heading in ("score", "episode", "entry", "text"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for hit in opened.search(vector, k, episode_id):
        table.add_row(f"{hit.score:.3f}", _safe(hit.episode_id[:_ID]), _safe(hit.entry_id), _safe(hit.text))
    Console().print(table)


def export_command(
    store: Store,
    /,
    *,
    out: Path,
    what: Literal["entries", "episodes", "journal", "turns"] = "entries",
    vectors: bool = False,
) -> None:
    """Write the rows of a store as one file, to be read without LanceDB.

    Args:
        store: The store's folder.
        out: The file, JSON lines if it ends in .jsonl, Parquet if in .parquet.
        what: The rows: an entry at the end of an episode, an episode, a change or search, or a reply.
        vectors: Write the vectors of entries and journal as well.

    Raises:
        SettingError: another kind of file, or one that exists.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise SettingError(f"--out must end in .jsonl or .parquet, got {out.name!r}.")
    if out.exists():
        raise SettingError(f"{out} exists; name another file, or remove it.")
    opened = _open(store)
    _check(opened)
    rows = list(_rows(opened, what, vectors))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        if out.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False, default=_as_json) + "\n" for row in rows)
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), temporary)
    Console().print(_safe(f"{len(rows):,} {what} written to {out}"), soft_wrap=True)


def _open(folder: Path) -> MemoryStore:
    """The store in a folder.

    Raises:
        StoreError: there is none; the message names stores in its subfolders.
    """
    if not any((folder / f"{name}.lance").is_dir() for name in TABLES):
        below = sorted(path.parent for path in folder.glob("*/episodes.lance"))
        hint = f"Did you mean {', '.join(map(str, below[:5]))}?" if below else "Name the folder that `store=` named."
        raise StoreError(f"There is no memory store in {folder}. {hint}")
    return MemoryStore(folder)


def _check(store: MemoryStore) -> None:
    """Checks that all episodes are complete, and says on stderr how many are not listed.

    Raises:
        StoreError: an episode is incomplete.
    """
    if unlisted := store.check():
        note = (
            f"{unlisted:,} more episodes in {store.folder} have replies, and no row in 'episodes': a process still plays them, "
            "or was killed before their first commit was whole, or a file is missing."
        )
        Console(stderr=True).print(_safe(note), soft_wrap=True)


def _find(store: MemoryStore, prefix: str) -> EpisodeRecord:
    """The episode whose id begins with `prefix`.

    Raises:
        StoreError: there is none, or more than one.
    """
    matching = [record for record in store.episodes() if record.episode_id.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        some = ", ".join(record.episode_id[: len(prefix) + 4] for record in matching[:5])
        raise StoreError(
            f"{len(matching)} episodes begin with {prefix!r}: {some}{', …' * (len(matching) > 5)}. Give more characters."
        )
    raise StoreError(f"No episode begins with {prefix!r}. List them: atommem memory ls {store.folder}")


def _safe(text: str) -> Text:
    """Text of the data, whose brackets are no markup and whose control characters are visible."""
    return Text(printable(text))


def _cells(record: EpisodeRecord) -> list[Text]:
    reward = "" if record.status == INTERRUPTED else f"{record.reward:.3f}"
    names = [record.episode_id[:_ID], record.env_id, record.task_id, record.status, reward, str(record.steps)]
    return [_safe(name) for name in names]


def _print_entries(console: Console, memory: WorkingMemory, title: str) -> None:
    table = Table(title=f"{title}: {len(memory)} entries", title_justify="left")
    table.add_column("entry")
    table.add_column("text")
    for entry in memory.entries():
        table.add_row(_safe(entry.id), _safe(entry.text))
    console.print(table)


def _rows(store: MemoryStore, what: str, vectors: bool) -> Iterator[dict[str, Any]]:
    for record in store.episodes():
        name = {"episode_id": record.episode_id, "task_id": record.task_id}
        if what == "episodes":
            yield {**dataclasses.asdict(record), "settings": json.dumps(record.settings)}
        elif what == "turns":
            yield from (name | turn for turn in store.turns(record.episode_id))
        elif what == "journal":
            for change in store.changes(record.episode_id):
                vector = {"vector": change.pop("vector")}
                yield name | change | (vector if vectors else {})
        else:
            memory = store.memory_at(record.episode_id, record.steps)
            for entry, row in zip(memory.entries(), memory.vectors(), strict=True):
                yield name | {"entry_id": entry.id, "text": entry.text} | ({"vector": row} if vectors else {})


def _as_json(value: Any) -> Any:
    """Vectors as lists, times in ISO 8601."""
    return value.tolist() if isinstance(value, np.ndarray) else value.isoformat()
