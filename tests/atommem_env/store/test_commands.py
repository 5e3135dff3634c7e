"""The commands `atommem memory …` on a store with three episodes, run in this process."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401  # registers the environments
from atommem_env.cli import main
from atommem_env.store.memory_store import MemoryStore

lancedb = pytest.importorskip("lancedb")
pq = pytest.importorskip("pyarrow.parquet")

REPLIES = (
    "<create_memory>Ada [the first] lives in Rome.</create_memory>",
    "<create_memory>Bo cooks.</create_memory><update_memory>m1: Ada lives in Oslo.</update_memory>",
    "<delete_memory>m2</delete_memory><read_memory>Where is Ada?</read_memory>",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "memory"
    env = gym.make("AtomMem-Synthetic", store=folder)
    for seed in range(3):
        env.reset(seed=seed)
        for reply in REPLIES[: seed + 1]:
            env.step(reply)
    env.close()
    return folder


@pytest.fixture
def atommem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command: its exit status, and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["atommem", "memory", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_ls_names_every_episode_and_the_next_command(store: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    status, said = atommem("ls", store)
    assert status == 0
    for record in MemoryStore(store).episodes():
        assert record.episode_id[:10] in said
        assert record.task_id in said
    assert "atommem memory show" in said
    assert "1 of 3" in atommem("ls", store, "--last", 1)[1]


def test_show_and_at_step_tell_an_episode_named_by_a_prefix(store: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    record = MemoryStore(store).episodes()[-1]
    status, said = atommem("show", store, record.episode_id[:6])
    assert status == 0
    assert record.episode_id in said
    for shown in ("Ada [the first] lives in Rome.", "update", "delete", "Where is Ada?", "At the end: 1 entries"):
        assert shown in said
    after_one, after_two = (atommem("at-step", store, record.episode_id, step)[1] for step in (1, 2))
    assert "[the first]" in after_one
    assert "Bo" not in after_one
    assert "Ada lives in Oslo." in after_two
    assert "Bo cooks." in after_two


def test_search(store: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    status, said = atommem("search", store, "Ada lives in Oslo.", "--k", 1)
    assert status == 0
    assert "Ada lives in Oslo." in said
    assert "1.000" in said
    first = MemoryStore(store).episodes()[0].episode_id
    inside = atommem("search", store, "Ada lives in Oslo.", "--episode", first[:6])[1]
    assert "[the first]" in inside
    assert "Oslo" not in inside


@pytest.mark.parametrize("what", ["entries", "episodes", "journal", "turns"])
def test_export_writes_the_same_rows_in_both_forms(store: Path, tmp_path: Path, atommem, what: str) -> None:  # type: ignore[no-untyped-def]
    for name in ("rows.jsonl", "rows.parquet"):
        status, said = atommem("export", store, "--out", tmp_path / "new" / name, "--what", what, "--vectors")
        assert status == 0, said
    lines = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text("utf-8").splitlines()]
    rows = pq.read_table(tmp_path / "new" / "rows.parquet").to_pylist()
    assert len(rows) == len(lines) == {"entries": 1 + 2 + 1, "episodes": 3, "journal": 1 + 3 + 5, "turns": 6}[what]
    for line, row in zip(lines, rows, strict=True):
        assert line.keys() == row.keys()
        assert line.get("text") == row.get("text")
        assert line.get("vector") == row.get("vector")
    if what == "entries":
        assert [line["text"] for line in lines][-1] == "Ada lives in Oslo."
        assert len(lines[0]["vector"]) > 8


HOSTILE = "<create_memory>\x1b]0;title\x07 \x9b31m \u202egnp.exe [bold]x[/bold] [/] [link=file:///]y[/link] \\</create_memory>"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def test_nothing_in_a_store_controls_the_terminal(tmp_path: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "a\u202e[red]b"
    env = gym.make("AtomMem-Synthetic", store=folder)
    env.reset(seed=0)
    env.step(HOSTILE)
    env.close()
    (episode,) = (record.episode_id for record in MemoryStore(folder).episodes())
    for table in ("episodes", "turns", "journal", "entries"):
        values = {"episode_id": "id\x1b[31m"} | ({"task_id": "t\x1b[32m[b]"} if table == "episodes" else {})
        lancedb.connect(folder).open_table(table).update(where="true", values=values)
    for words in (
        ("ls", folder),
        ("show", folder, "id"),
        ("at-step", folder, "id", 1),
        ("search", folder, "title"),
        ("show", folder, "\x1b"),
        ("show", folder, episode),
        ("export", folder, "--out", tmp_path / "\x1b[31m.jsonl"),
    ):
        status, output = atommem(*words)
        assert not UNSAFE.search(output), output
        if words[0] in ("at-step", "search"):
            assert status == 0
            assert "\\x1b]0;title\\x07 \\x9b31m \\u202egnp.exe [bold]x[/bold] [/] [link=file:///]y[/link] \\" in output
    assert "t\\x1b[32m[b]" in atommem("ls", folder)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limit on the size of files")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_full_disk_leaves_no_part_of_an_export(store: Path, tmp_path: Path, atommem, name: str) -> None:  # type: ignore[no-untyped-def]
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        status, output = atommem("export", store, "--out", tmp_path / name, "--vectors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert "File too large" in output
    assert output.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def damaged(data: bytes) -> dict[str, bytes | None]:
    """What can become of a file; None: it is gone."""
    return {"deleted": None, "truncated": data[: len(data) // 2], "garbled": data[::-1]}


def test_damaged_files_are_errors_or_change_nothing(store: Path, tmp_path: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    episode = MemoryStore(store).episodes()[-1].episode_id
    commands = (("ls",), ("show", episode))

    def run() -> list[tuple[int, str]]:
        return [atommem(name, tmp_path / "copy", *words) for name, *words in commands]

    shutil.copytree(store, tmp_path / "copy")
    whole = run()
    assert [status for status, _ in whole] == [0, 0]
    errors = 0
    for path in [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for content in damaged(data).values():
            path.unlink() if content is None else path.write_bytes(content)
            for right, (status, output) in zip(whole, run(), strict=True):
                if (status, output) != right:
                    assert status == 1
                    assert str(tmp_path / "copy") in output
                    errors += 1
            path.write_bytes(data)
    assert errors > 30
    assert run() == whole


def test_what_cannot_be_done_says_what_can(store: Path, tmp_path: Path, atommem) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "there.jsonl").write_text("")
    episode = MemoryStore(store).episodes()[0].episode_id
    for words, hint in (
        (("ls", tmp_path), "no memory store in"),
        (("ls", store.parent), f"Did you mean {store}"),
        (("show", store, "zzz"), "atommem memory ls"),
        (("show", store, ""), "3 episodes begin with ''"),
        (("at-step", store, episode, 99), "step must be from 0"),
        (("export", store, "--out", tmp_path / "rows.csv"), ".jsonl or .parquet"),
        (("export", store, "--out", tmp_path / "there.jsonl"), "there.jsonl exists; name another file"),
        (("search", store, "Ada", "--embedder", "nothing"), "embedder"),
    ):
        status, said = atommem(*words)
        assert status == 1, said
        assert hint in said.replace("\n", " ")
