"""The commands `atommem data get`, `import`, `verify` and `list`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from atommem_env import ENVIRONMENTS
from atommem_env.errors import DatasetNotFound
from atommem_env.paths import data_folder
from atommem_env.tasks.catalogue import (
    PARSERS,
    ImportReport,
    check_names,
    import_dataset,
    imported_splits,
    open_dataset,
    question_files,
    sha256_of,
    shared_questions,
    verify_dataset,
)
from atommem_env.tasks.download import download, find_published
from atommem_env.terminal import escape, printable

Dataset = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar=f"{{{','.join(PARSERS)}}}")]
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def get_command(
    dataset: Dataset,
    /,
    *,
    split: str = "dev",
    corpus: Path | None = None,
    url: str | None = None,
    sha256: str | None = None,
) -> None:
    """Download a dataset's published file, check it against its known SHA-256, and import it.

    The same command again resumes a download that broke off.

    Args:
        dataset: Which dataset.
        split: Which file, and the name to import it under: dev or train.
        corpus: Documents with `title` and `text` that fill contexts; without it, the other questions' do.
        url: Another address: of the same file, or, with --sha256, of any file in the dataset's form.
        sha256: SHA-256 of the file at that address; without it, that of the published file.
    """
    check_names(dataset, split)
    url, sha256, size = find_published(dataset, split, url, sha256)
    console = Console()
    if split in imported_splits(dataset):
        report = open_dataset(dataset, split).report
        if [source.sha256 for source in report.sources] == [sha256, *([sha256_of(corpus)] if corpus else [])]:
            _show(console, [report], "Imported before, from the same file")
            return
    target = data_folder("downloads", f"{dataset}-{split}-{sha256[:8]}")
    with Progress(*_COLUMNS, console=console, transient=True) as bar:
        task = bar.add_task("Downloading", total=size)
        download(url, target, sha256, size, lambda done, total: bar.update(task, completed=done, total=total))
    _import(console, dataset, split, [target], corpus)
    target.unlink()


def import_command(
    dataset: Dataset,
    files: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    split: str = "dev",
    corpus: Path | None = None,
) -> None:
    """Import a dataset's official file, so that its environment works without naming files.

    Every row is checked first; what was imported before stays until the new import is complete.

    Args:
        dataset: Which dataset the file belongs to.
        files: The official file, all its shards, or a folder of them: a JSON list or JSON lines, plain or gzipped, or parquet.
        split: The name to import it under.
        corpus: Documents with `title` and `text` that fill contexts; without it, the other questions' do.
    """
    check_names(dataset, split)
    _import(Console(), dataset, split, question_files(files), corpus)


def _import(console: Console, dataset: str, split: str, files: Sequence[Path], corpus: Path | None) -> None:
    with Progress(*_COLUMNS, console=console, transient=True) as bar:
        sizes = {path: path.stat().st_size for path in (*files, corpus) if path is not None and path.is_file()}
        tasks = {path: bar.add_task(f"Reading {escape(path.name)}", total=size) for path, size in sizes.items()}
        report = import_dataset(
            dataset, split, files, corpus, lambda path, done: bar.update(tasks[path], completed=done)
        )
    _show(console, [report], "Imported")
    if shared := shared_questions(dataset, split):
        others = ", ".join(f"{count:,} of {report.rows:,} in {other!r}" for other, count in shared.items())
        _print(console, f"Questions that were imported before, under another split: {others}.")
    environment = next(f"AtomMem-{name}" for name, kwargs in ENVIRONMENTS.items() if kwargs.get("source") == dataset)
    option = "" if split == "dev" else f', split="{split}"'
    _print(console, f'Next, in Python: import atommem_env, gymnasium; gymnasium.make("{environment}"{option})')


def verify_command(
    dataset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar=f"[{{{','.join(PARSERS)}}}]")] = None, /
) -> None:
    """Check imported datasets against the hashes and counts taken when they were imported.

    Args:
        dataset: Which dataset; all when left out.
    """
    if dataset is not None:
        check_names(dataset)
    names = _imported(dataset)
    _show(Console(), [verify_dataset(*name) for name in names], "Verified, unchanged since the import")


def list_command() -> None:
    """List the datasets that are imported."""
    reports = [open_dataset(*name).report for name in _imported(None)]
    _show(Console(), reports, "Imported")


def _imported(dataset: str | None) -> list[tuple[str, str]]:
    """(dataset, split) of every import; `DatasetNotFound` if there is none."""
    names = [(name, split) for name in ([dataset] if dataset else PARSERS) for split in imported_splits(name)]
    if not names:
        what = f"No {dataset} file" if dataset else "No dataset"
        raise DatasetNotFound(
            f"{what} is imported in {data_folder('data')}. Import an official file: "
            f"atommem data import {dataset or 'hotpotqa'} --split dev FILE --corpus FILE"
        )
    return names


def _show(console: Console, reports: Sequence[ImportReport], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("dataset", "split", "questions", "documents", "filled from"):
        table.add_column(heading, justify="right" if heading in ("questions", "documents") else "left")
    for report in reports:
        filled = "other questions" if report.corpus_documents is None else f"corpus of {report.corpus_documents:,}"
        table.add_row(
            escape(report.dataset),
            escape(report.split),
            f"{report.rows:,}",
            f"{report.documents:,}",
            filled,
        )
    console.print(table)
    for report in reports:
        notes = {"questions left out: unanswerable": report.unanswerable}
        notes |= {f"questions repaired: {what}": count for what, count in report.repairs.items()}
        notes["corpus rows left out: blank, or the same as another"] = report.corpus_left_out
        for line in (report.folder, *(f"  {count:,} {what}" for what, count in notes.items() if count)):
            _print(console, line)


def _print(console: Console, line: str) -> None:
    """A line with names from data in it."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
