"""`atommem eval RECIPE.toml`: many policies on many environments, each an ordinary run of `eval.run`.

    atommem eval quick.toml --out runs/quick
    atommem eval my_recipe.toml --dry-run          # the runs, and how much there is to do; no model is needed

A recipe is a TOML file:

    episodes = 10                     # of each run
    seeds = [0, 1, 2]                 # a run each; [0] by default

    [env]                             # of all runs: options of `atommem eval`
    embedder = "minilm"

    [[environments]]
    env_id = "AtomMem-HotpotQA"
    num_docs = [200, 400]             # of a list each number is an environment
    questions = 10

    [[policies]]
    policy = "rag@smollm2"

    [[policies]]
    label = "RAG (BM25)"              # what tables call it; else the policy's name and what was set
    policy = "rag@smollm2"
    set = ["retrieval=bm25"]          # for this row alone

An option of an environment comes before that of [env], and one of a policy before both; their `set` are joined, and of two
values the last counts. What decides the tasks (`num_docs`, `split`, …) belongs to [env] and the environments, so that all
policies play the same episodes. A policy that is the folder of a trained model keeps the layout, the dialect and the
`max_new_tokens` that it was trained with (`eval.played_as`), unless its own row says otherwise. How a recipe is based on another
one: `eval.toml_tables`; [[environments]] and [[policies]] then replace the base's, as a whole.

A run lies in FOLDER/ENVIRONMENT/POLICY/seed-N. The same command again plays what is missing or failed; where the recipe now says
something else than a run's folder does, that run is rejected.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from atommem_env.errors import AtomMemError, EmbeddingError, EngineDied, ModelError, SettingError
from atommem_env.terminal import escape
from eval.command_line import parse_eval
from eval.metrics import summarise
from eval.options import EvalConfig, PlayConfig
from eval.played_as import read_card
from eval.players import prepare_evaluation
from eval.progress import step_progress
from eval.report.tables import results_table
from eval.run import evaluate
from eval.run_folder import read_json, read_jsonl, require_same_config, require_trusted
from eval.toml_tables import RecipeFile, fields_of, read_recipe_file, read_table
from eval.workers import Workers
from eval.workload import NOTE, Workload, Workloads, check_config

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "eval"
_OPTIONS = {
    name: kind
    for name, kind in fields_of(PlayConfig).items()
    if name not in ("env_id", "policy", "out", "episodes", "seed")
}
_OF_TASKS = ("split", "data", "corpus", "num_docs", "questions", "files", "source")
_TABLES: dict[str, dict[str, Any]] = {
    "env": _OPTIONS,
    "environments": {"label": str, "env_id": str, **_OPTIONS, "num_docs": int | tuple[int, ...]},
    "policies": {"label": str, "policy": str} | {name: _OPTIONS[name] for name in _OPTIONS if name not in _OF_TASKS},
}
_OUTAGES = (EmbeddingError, ModelError, EngineDied)  # an hour later the same run may do


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """Which runs."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE.toml")]
    """A TOML file of yours, or one that comes with this package: quick.toml, baselines.toml, paper.toml."""
    out: Path | None = None
    """Folder of all runs. Left out: runs/ and the recipe's name."""
    dry_run: bool = False
    """List the runs, what is done already, and how much there is to reply to and to read; play nothing, and load no model."""
    workers: int = 0
    """Processes of Ray's that play, see `atommem eval --help`; 0: this process plays."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a recipe; the labels are those of its row and column in a table."""

    environment: str
    policy: str
    config: EvalConfig

    @property
    def name(self) -> str:
        return f"{self.policy} on {self.environment}, seed {self.config.seed}"

    @property
    def finished(self) -> int:
        """Episodes that its folder holds."""
        return len(read_jsonl(self.config.out / "episodes.jsonl"))

    @property
    def done(self) -> bool:
        return (self.config.out / "summary.json").is_file()


# ------------------------------------------------------------------------------------------------------------ the recipe


def read_recipe(path: Path, out: Path) -> list[PlannedRun]:
    """The runs of a recipe: by environment, then by policy, then by seed.

    Args:
        path: the file, or the name of one in `configs/eval/`.
        out: folder of all runs.

    Raises:
        SettingError: as in `read_recipe_file`, or something in a file is not as it must be.
    """
    file = read_recipe_file(str(path), FOLDER)
    tables = file.tables
    top = {name: value for name, value in tables.items() if name not in _TABLES}
    given = read_table(file, "the recipe", top, {"episodes": int, "seeds": tuple[int, ...], **_TABLES})
    (shared,) = _rows(file, "env")
    environments = [one for row in _rows(file, "environments", "env_id") for one in _environments(row)]
    policies = [{"label": _default_label(row), **row} for row in _rows(file, "policies", "policy")]
    seeds = given.pop("seeds", (0,))
    if not (environments and policies and seeds):
        raise SettingError(f"{file} has no run: it needs [[environments]], [[policies]] and, where given, seeds.")
    runs = []
    for environment in environments:
        for policy in policies:
            layers = (shared, environment, _as_trained(policy), policy)
            options = {name: value for layer in layers for name, value in layer.items()}
            options["set"] = tuple(pair for layer in layers for pair in layer.get("set", ()))
            labels = environment["label"], policy["label"]
            for seed in seeds:
                folder = out.joinpath(*map(_folder_name, labels), f"seed-{seed}")
                runs.append(
                    PlannedRun(
                        *labels, EvalConfig(**options | given | {"environment": labels[0], "seed": seed, "out": folder})
                    )
                )
    folders = Counter(str(run.config.out).casefold() for run in runs)  # some file systems take A and a for the same
    same = [run for run in runs if folders[str(run.config.out).casefold()] > 1]
    if same:
        raise SettingError(
            f"{file}: {same[0].name} and {same[1].name} would share the folder {same[0].config.out}. "
            "Give one of them another label."
        )
    return runs


def _rows(file: RecipeFile, name: str, required: str | None = None) -> list[dict[str, Any]]:
    """The tables of that name, [name] or [[name]]; a field that is `required` is in each of them."""
    brackets = f"[[{name}]]" if required else f"[{name}]"
    rows = file.tables.get(name, [] if required else {})
    if required is None:
        rows = [rows]
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise SettingError(f"{file}: {name} must be written as {brackets}, got {rows!r}.")
    read = [read_table(file, brackets[1:-1], row, _TABLES[name]) for row in rows]
    for row in read:
        if required and required not in row:
            raise SettingError(f"{file}: every {brackets} must have {required}; one has {row}.")
    return read


def _as_trained(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's policy was trained with and keeps in any environment; {} where it is not a trained model."""
    card = read_card(row["policy"])
    if card is None:
        return {}
    require_trusted(card.values, card.path, trust=bool(row.get("trust")))
    trained: dict[str, Any] = {"layout": card.layout, "max_new_tokens": card.max_new_tokens}
    if "dialect" not in row:
        trained["set"] = (f"dialect={card.dialect}",)  # not as an option, which the `set` of [env] would come before
    return trained


def _environments(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An environment for each number of documents.

    >>> [one["label"] for one in _environments({"env_id": "AtomMem-HotpotQA", "num_docs": (200, 400)})]
    ['HotpotQA 200', 'HotpotQA 400']
    """
    label, counts = row.get("label", row["env_id"].removeprefix("AtomMem-")), row.get("num_docs")
    if not isinstance(counts, tuple):
        yield row | {"label": label}
    else:
        for count in counts:
            yield row | {"label": f"{label} {count}", "num_docs": count}


def _default_label(row: dict[str, Any]) -> str:
    """The policy's name, and what was set for it.

    >>> _default_label({"policy": "smollm2", "set": ("ablation=no_update",)})
    'smollm2 ablation=no_update'
    """
    return " ".join([row["policy"], *row.get("set", ())])


def _folder_name(label: str) -> str:
    """A label as the name of a folder.

    >>> _folder_name("RAG (BM25)"), _folder_name("rag@openai:Qwen/Qwen3-8B")
    ('RAG-BM25', 'rag@openai-Qwen-Qwen3-8B')
    """
    return re.sub(r"[^\w.=+@-]+", "-", label).strip("-.") or "unnamed"


# -------------------------------------------------------------------------------------------------------------- playing


def workloads(runs: Sequence[PlannedRun]) -> dict[PlannedRun, Workload]:
    """What an episode of each run takes; nothing is written, and no model is loaded or called.

    Raises:
        SettingError: the recipe cannot be played as it is: an unknown policy, missing data, a wrong setting. All are named.
    """
    wrong, known = _Wrong(), Workloads()
    found: dict[PlannedRun, Workload] = {}
    for run in runs:
        with wrong.noting(run):
            check_config(run.config)
        with wrong.noting(run):
            found[run] = known.of(run.config)
    wrong.reject()
    return found


def check(runs: Sequence[PlannedRun]) -> dict[PlannedRun, str]:
    """Why some runs cannot be played now, after everything was tried that can be without playing; nothing is written.

    Returns:
        The cause by run: a service that is out of reach, or a folder that holds a run of another configuration.

    Raises:
        SettingError: as in `workloads`, before any model is loaded; or a model is missing, or cannot be what its policy needs.
    """
    workloads(runs)
    troubles: dict[PlannedRun, str] = {}
    wrong = _Wrong()
    outages: dict[str | None, EmbeddingError] = {}  # by embedder: each was waited for long enough
    for run in runs:
        config = run.config
        try:
            if config.embedder in outages:
                raise outages[config.embedder]
            with wrong.noting(run):
                driver, _, opened = prepare_evaluation(config)
                driver.store.close()
                try:
                    if run.finished:
                        require_same_config(config.out / "config.json", opened.resolved_config)
                except SettingError as error:
                    troubles[run] = f"{_message(error)} Move that folder away, or choose another --out."
        except _OUTAGES as error:
            troubles[run] = _message(error)
            if isinstance(error, EmbeddingError):
                outages[config.embedder] = error
    wrong.reject()
    return troubles


class _Wrong:
    """Errors of a recipe, each with the runs that it concerns."""

    def __init__(self) -> None:
        self._runs: defaultdict[str, dict[PlannedRun, None]] = defaultdict(dict)

    @contextmanager
    def noting(self, run: PlannedRun) -> Iterator[None]:
        """Notes an error of the block, unless an hour later the same run may do."""
        try:
            yield
        except _OUTAGES:
            raise
        except AtomMemError as error:
            self._runs[_message(error)][run] = None

    def reject(self) -> None:
        """Raises what was noted, as one `SettingError`."""
        if self._runs:
            lines = (
                f"\n  {message} ({next(iter(runs)).name}{f', and {len(runs) - 1} more' if len(runs) > 1 else ''})"
                for message, runs in self._runs.items()
            )
            raise SettingError(f"This recipe cannot be played as it is:{''.join(lines)}")


def play_recipe(
    runs: Sequence[PlannedRun], console: Console | None = None, *, workers: Workers | None = None
) -> dict[PlannedRun, str]:
    """Plays the runs that are not done yet, one after another, with the models loaded once.

    Args:
        console: where progress is drawn; stderr by default.
        workers: who plays; this process by default.

    Returns:
        The cause of each run that failed; its finished episodes are in its folder, and the others were played.

    Raises:
        SettingError: as in `check`, before anything is played.
    """
    failures = workers.call(check, runs) if workers else check(runs)  # where models are loaded for what follows
    with step_progress(console or Console(stderr=True)) as progress:
        done = sum(run.done for run in runs)
        bar = progress.add_task("all runs", total=len(runs), completed=done, status="")
        for run in runs:
            if run.done or run in failures:
                continue
            try:
                evaluate(dataclasses.replace(run.config, resume=run.finished > 0), progress=progress, player=workers)
            except Exception as error:  # of any kind: a policy may be anybody's
                failures[run] = _message(error)
                trace = "" if isinstance(error, AtomMemError) else traceback.format_exc()
                progress.console.print(escape(f"{run.name} failed. {failures[run]}\n{trace}"))
            else:
                done += 1
            progress.update(bar, completed=done, status=f"{len(failures)} failed" if failures else "")
    return failures


def _message(error: Exception) -> str:
    """An error in words, with its notes."""
    head = str(error) if isinstance(error, AtomMemError) else f"{type(error).__name__}: {error}"
    return " ".join([head, *(f"({note})" for note in getattr(error, "__notes__", ()))])


# -------------------------------------------------------------------------------------------------------------- reporting


def tables(runs: Sequence[PlannedRun], failures: dict[PlannedRun, str]) -> list[Table]:
    """The results, a table an environment; a policy's seeds are pooled, and the failed ones are named as such."""
    made = []
    for environment in dict.fromkeys(run.environment for run in runs):
        ours = [run for run in runs if run.environment == environment]
        rows, failed = [], []
        for policy in dict.fromkeys(run.policy for run in ours):
            seeds = [run for run in ours if run.policy == policy]
            there = [run for run in seeds if run not in failures]
            if there:
                records = [record for run in there for record in read_jsonl(run.config.out / "episodes.jsonl")]
                privileged = read_json(there[0].config.out / "summary.json")["privileged"]
                missing = "" if there == seeds else f" ({len(there)} of {len(seeds)} seeds)"
                rows.append({"label": policy + missing, "privileged": privileged, **summarise(records)})
            else:
                failed.append(policy)
        counts = sorted({row["episodes"] for row in rows})
        title = f"{environment}, {' or '.join(map(str, counts))} episodes" if counts else environment
        table = results_table(rows, title)
        for policy in failed:
            table.add_row(policy, "failed")
        made.append(table)
    return made


def plan(runs: Sequence[PlannedRun], episodes: Mapping[PlannedRun, Workload]) -> Table:
    """The runs, how far each is, and what is missing of it: replies, and tokens to read.

    Args:
        episodes: of each run, what an episode takes.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=True)
    for heading in ("environment", "policy"):
        table.add_column(heading, overflow="fold")
    missing = [episodes[run].times(0 if run.done else max(run.config.episodes - run.finished, 0)) for run in runs]
    table.add_column("seed", justify="right")
    table.add_column("episodes done", justify="right")
    table.add_column("replies", f"{sum(one.replies for one in missing):,}", justify="right")
    table.add_column("tokens read", f"{sum(one.tokens for one in missing):,}", justify="right")
    for run, left in zip(runs, missing, strict=True):
        done = f"{run.finished} of {run.config.episodes}"
        counts = (str(run.config.seed), done, f"{left.replies:,}", f"{left.tokens:,}")
        table.add_row(escape(run.environment), escape(run.policy), *counts)
    return table


def main(config: RecipeConfig) -> None:
    """Evaluate many policies on many environments, as a recipe says: a table an environment, and a folder a run.

    The same command again plays only what is missing or failed.
    """
    console = Console()
    out = config.out or Path("runs") / config.recipe.stem
    runs = read_recipe(config.recipe, out)
    if config.dry_run:
        console.print(plan(runs, workloads(runs)))
        console.print(NOTE)
        return
    with Workers(config.workers) if config.workers else nullcontext() as workers:
        failures = play_recipe(runs, workers=workers)
    for table in tables(runs, failures):
        console.print(table)
    for run, message in failures.items():
        console.print(f"[bold]{escape(run.name)}[/]: {escape(message)}", highlight=False)
    if failures:
        console.print(f"{len(failures)} of {len(runs)} runs failed. The same command again plays only these.")
        raise SystemExit(1)
    console.print(f"Written to [bold]{escape(str(out))}[/]. Tables and plots: atommem report {escape(str(out))}")


def call(command: str, function: Callable[[Any], None], words: Sequence[str]) -> None:
    """`atommem eval` with its arguments: of a recipe where one of them is a TOML file, else of a single run."""
    prog = f"atommem {command}"
    if any(word.endswith(".toml") and not word.startswith("-") for word in words):
        tyro.cli(main, prog=prog, args=words, config=(tyro.conf.OmitArgPrefixes,))
        return
    config, notes = parse_eval(prog, inspect.getdoc(function) or "", words)
    for note in notes:
        Console(stderr=True).print(note, soft_wrap=True, markup=False, highlight=False)
    function(config)
