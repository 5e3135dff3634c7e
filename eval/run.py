"""`atommem eval`: one policy on one environment.

    atommem eval AtomMem-Synthetic --policy oracle --episodes 50 --out runs/oracle

The folder `--out` then holds `config.json` (what was asked for), `episodes.jsonl` (a line an episode; the same bytes for the
same configuration), `costs.jsonl` (what the clock and a model's service decide: a line an episode, in seconds),
`summary.json` (the numbers) and `memory/` (every entry written, a LanceDB folder).

Many policies on many environments: `eval.recipe`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import atommem_env  # noqa: F401  (registers the environments)
from agents.chat_policy import GREEDY, Sampling
from agents.policy import Policy
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec, run_blocking
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.tasks import source_options
from atommem_env.tokens import get_tokenizer
from atommem_env.types import Rollout
from eval.metrics import SCHEMA_VERSION, episode_cost, episode_record, summarise, summarise_costs
from eval.workers import Workers

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvOptions:
    """The environment, and how a language model plays it. Options left out are the environment's own."""

    env_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")]
    """Environment: AtomMem-Synthetic, AtomMem-HotpotQA, AtomMem-2WikiMultiHopQA, AtomMem-MuSiQue or AtomMem-Files."""
    split: str | None = None
    """Split of the dataset."""
    data: Path | None = None
    """Questions file in the dataset's official form, instead of what was imported; for AtomMem-Files, your questions."""
    corpus: Path | None = None
    """Paragraphs file ({"title", "text"} a line) that haystacks are filled from."""
    num_docs: int | None = None
    """Documents in each context."""
    questions: int | Literal["sampled"] | None = None
    """Questions in each task; sampled: one with probability 1/2, two to ten with 1/18 each."""
    files: tuple[Path, ...] = ()
    """What AtomMem-Files reads: files, or folders of them."""
    embedder: str | None = None
    """hashing, minilm, st:MODEL (of sentence-transformers), or openai:MODEL: a service that speaks the OpenAI API, at
    OPENAI_EMBEDDING_BASE_URL or else OPENAI_BASE_URL."""
    durability: str | None = None
    """off; or keep every entry in the folder's memory/, at the end of each episode (episode) or after each reply (step)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Any other argument of the environment, for example top_k=12 or operations=["create","read"]."""
    layout: str = "shared_prefix"
    """How a language model is shown an observation: shared_prefix, terse for small models, or public_code:PATH."""
    temperature: float = GREEDY.temperature
    """Of a language model; 0 is greedy."""
    max_new_tokens: int = GREEDY.max_new_tokens
    """Of each reply of a language model; a longer one is cut."""
    in_flight: int = 64
    """Episodes played at the same time; changes the speed only."""

    def env_options(self) -> dict[str, Any]:
        """The keyword arguments of `gym.make` that were given."""
        names = ("split", "data", "corpus", "num_docs", "questions", "embedder", "durability")
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        options |= {name: str(options[name].resolve()) for name in ("data", "corpus") if name in options}
        if self.files:
            options["files"] = [str(path.resolve()) for path in self.files]
        for pair in self.set:
            name, equals, value = pair.partition("=")
            if not equals:
                raise SettingError(f"--set takes NAME=VALUE, got {pair!r}.")
            options[name] = _value(value)
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig(EnvOptions):
    """Which episodes a policy plays, and where what comes of them is kept."""

    policy: str = "oracle"
    """Policy: a name from `atommem policies`, or module:attribute."""
    out: Path
    """Folder of the run."""
    episodes: int = 50
    """How many episodes."""
    seed: int = 0
    """Draws the tasks, their documents and whatever a policy draws."""
    thinking: bool = False
    """Whether a language model that can think before it replies does; max_new_tokens holds what it thinks as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(EnvConfig):
    """What an evaluation is. Options left out are the environment's own."""

    out: Path = Path("runs/eval")
    """Folder of the run."""
    label: str | None = None
    """What tables call this run, instead of the policy's name."""
    environment: tyro.conf.Suppress[str | None] = None
    """What tables call its environment; recipes say so."""
    workers: int = 0
    """Processes of Ray's that play, --in-flight episodes each, on the Ray that runs (RAY_ADDRESS) or else on one of this
    machine, with an equal share of its GPUs each; 0: this process plays. All machines must see the working folder, --out and
    the data."""
    resume: bool = False
    """Go on with an interrupted run in the same folder: only what is missing is played."""


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text itself.

    >>> _value("12"), _value("public_code")
    (12, 'public_code')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def episode_specs(length: int, episodes: int, seed: int) -> list[EpisodeSpec]:
    """Which episodes an evaluation plays: tasks in a random order without repetition, and over again once all were played.

    >>> [spec.index for spec in episode_specs(3, 5, seed=0)]
    [2, 0, 1, 2, 0]
    """
    rng = np.random.default_rng([seed, 0])
    if length <= 100_000:
        order = rng.permutation(length).tolist()
    else:  # an endless source: drawn, each once
        order = list(dict.fromkeys(rng.integers(length, size=2 * episodes + 100).tolist()))
    seeds = np.random.default_rng([seed, 1]).integers(2**31, size=(episodes, 2)).tolist()
    return [EpisodeSpec(order[i % len(order)], *seeds[i]) for i in range(episodes)]


def evaluate(
    config: EvalConfig,
    console: Console | None = None,
    *,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Runs an evaluation and returns what `summary.json` holds.

    Args:
        console: where a progress bar is drawn; stderr unless told.
        progress: a display that is running already, which gets the bar instead.
        workers: who plays; `config.workers` new ones unless told, and with none of those this process.

    Raises:
        SettingError: the folder holds another run, or an interrupted one and `resume` is off.
        JobFailed: workers died, see `Workers.play`.
        Exception: what the policy, the embedder or the store raised. Finished episodes are kept for `resume`.
    """
    if workers:
        identity, privileged, length = workers.open(prepare_evaluation, config)

        def play_there(specs: Mapping[int, EpisodeSpec], rewards: Sequence[float], finished: _Finished) -> None:
            name = f"{identity['label']} on {config.env_id}"
            with _episode_bar(console, progress, name, len(specs), rewards) as bar:

                def ended(record: dict[str, Any], cost: dict[str, Any]) -> None:
                    finished(record, cost)
                    bar.replied(record["steps"])
                    bar.ended(record["reward"])

                workers.play(specs, config.in_flight, ended)

        return _evaluate(config, identity, privileged, length, play_there)
    if config.workers:
        with Workers(config.workers) as started:
            return evaluate(config, console, progress=progress, workers=started)
    env, policy, identity = prepare_evaluation(config)
    tokenizer = get_tokenizer(env.settings.tokenizer)

    def play_here(specs: Mapping[int, EpisodeSpec], rewards: Sequence[float], finished: _Finished) -> None:
        began: dict[int, float] = {}
        positions = list(specs)

        def begin(number: int) -> None:
            began[number] = time.perf_counter()

        def ended(number: int, rollout: Rollout) -> None:
            position, seconds = positions[number], time.perf_counter() - began[number]
            finished(episode_record(position, rollout, tokenizer), episode_cost(position, rollout, seconds))

        play(
            config,
            env,
            policy,
            list(specs.values()),
            console,
            progress=progress,
            label=identity["label"],
            rewards_before=rewards,
            begun=begin,
            finished=ended,
        )

    with closing(env):
        return _evaluate(config, identity, policy.privileged, len(env.source), play_here)


_Records = dict[int, dict[str, Any]]  # by episode
_Finished = Callable[[dict[str, Any], dict[str, Any]], None]  # told of each episode: its record, and its cost


def _evaluate(
    config: EvalConfig,
    identity: dict[str, Any],
    privileged: bool,
    length: int,
    play_missing: Callable[[Mapping[int, EpisodeSpec], Sequence[float], _Finished], None],
) -> dict[str, Any]:
    """`evaluate`, by whoever plays.

    Args:
        privileged: of the policy.
        length: how many tasks there are.
        play_missing: plays episodes by their position; it is also given the rewards of those that were played before.
    """
    finished, costs = _open_run(config, identity)
    specs = dict(enumerate(episode_specs(length, config.episodes, config.seed)))
    missing = {position: spec for position, spec in specs.items() if position not in finished}
    before = max((cost["elapsed"] for cost in costs.values()), default=0.0)
    started = time.perf_counter()
    lines, cost_lines = config.out / "episodes.jsonl", config.out / "costs.jsonl"
    with (
        lines.open("a", encoding="utf-8", newline="\n") as file,
        cost_lines.open("a", encoding="utf-8", newline="\n") as cost_file,
    ):

        def keep(record: dict[str, Any], cost: dict[str, Any]) -> None:
            position = record["episode"]
            finished[position] = record
            costs[position] = cost | {"elapsed": round(before + time.perf_counter() - started, 3)}
            # A kill between the two leaves a cost without its episode, which does no harm.
            for written, to in ((costs[position], cost_file), (record, file)):
                to.write(json_line(written))
                to.flush()

        play_missing(missing, [record["reward"] for record in finished.values()], keep)
    records, spent = ([kept[position] for position in specs] for kept in (finished, costs))
    replace_file(lines, "".join(map(json_line, records)))
    replace_file(cost_lines, "".join(map(json_line, spent)))
    summary = {
        "env_id": config.env_id,
        "environment": config.environment or _environment(identity),
        "label": identity["label"],
        "policy": identity["policy"],
        "privileged": privileged,
        **summarise(records),
        **summarise_costs(spent, sum(record["steps"] for record in records)),
        "settings": {
            **{name: identity[name] for name in ("seed", "layout", "sampling")},
            **identity["options"],
            **identity["settings"],
        },
        "schema_version": SCHEMA_VERSION,
    }
    replace_file(config.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _environment(identity: dict[str, Any]) -> str:
    """What tables call it.

    >>> _environment({"env_id": "AtomMem-HotpotQA", "options": {"num_docs": 200}})
    'AtomMem-HotpotQA, 200 documents'
    """
    documents = identity["options"].get("num_docs")
    return identity["env_id"] + (f", {documents} documents" if documents else "")


def prepare_evaluation(config: EvalConfig) -> tuple[AtomMemEnv, Policy, dict[str, Any]]:
    """`prepare`, with the run's label."""
    env, policy, identity = prepare(config)
    return env, policy, {**identity, "label": config.label or policy.name}


def prepare(config: EnvConfig) -> tuple[AtomMemEnv, Policy, dict[str, Any]]:
    """The environment, the policy, and what tells the run from every other, as `config.json` says it; nothing is written.

    Raises:
        AtomMemError: the environment or the policy cannot be had as asked.
    """
    options = config.env_options()
    if config.episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {config.episodes}.")
    env = gym.make(config.env_id, **{"store": str(config.out / "memory"), **options}).unwrapped
    assert isinstance(env, AtomMemEnv)
    sampling = Sampling(config.temperature, config.max_new_tokens, config.thinking)
    policy = load_policy(config.policy, env.settings, sampling, config.layout)
    defaults = {name: option.default for name, option in source_options(env.source.dataset).items()}
    identity = {
        "env_id": config.env_id,
        "policy": policy.name,
        "episodes": config.episodes,
        "seed": config.seed,
        "options": {**defaults, **options},  # defaults too, so that the run stays what it is when one changes
        "layout": config.layout,
        "sampling": dataclasses.asdict(sampling),
        "settings": dataclasses.asdict(env.settings),
        "schema_version": SCHEMA_VERSION,
    }
    return env, policy, json.loads(json.dumps(identity))


def play(
    config: EnvConfig,
    env: AtomMemEnv,
    policy: Policy,
    specs: Sequence[EpisodeSpec],
    console: Console | None = None,
    *,
    progress: Progress | None = None,
    label: str | None = None,
    rewards_before: Sequence[float] = (),
    begun: Callable[[int], None] = lambda position: None,
    finished: Callable[[int, Rollout], None] = lambda position, rollout: None,
) -> list[Rollout]:
    """Plays `specs` in their order under a progress bar.

    Args:
        console: where the bar is drawn; stderr unless told.
        progress: a display that is running already, which gets the bar instead.
        label: what the bar calls the policy, instead of its name.
        rewards_before: of episodes that were played before, for the bar.
        begun: see `Driver.run`, as for `finished` and what is returned and raised.
    """
    name = f"{label or policy.name} on {config.env_id}"
    with _episode_bar(console, progress, name, len(specs), rewards_before) as bar:

        def ended(position: int, rollout: Rollout) -> None:
            finished(position, rollout)
            bar.ended(rollout.reward)

        return run_blocking(
            Driver.of(env).run(
                specs, policy, in_flight=config.in_flight, begun=begun, finished=ended, replied=bar.replied
            )
        )


@dataclass(slots=True)
class _EpisodeBar:
    """Counts episodes, and tells of replies and of the mean reward beside."""

    display: Progress
    bar: TaskID
    rewards: list[float]
    replies: int = 0

    def ended(self, reward: float) -> None:
        self.rewards.append(reward)
        self.show()

    def replied(self, times: int = 1) -> None:
        self.replies += times
        self.show()

    def show(self) -> None:
        em = f", EM {fmean(self.rewards):.3f}" if self.rewards else ""
        self.display.update(self.bar, completed=len(self.rewards), told=f"{self.replies} replies{em}")


@contextmanager
def _episode_bar(
    console: Console | None, progress: Progress | None, name: str, episodes: int, rewards: Sequence[float]
) -> Iterator[_EpisodeBar]:
    """A bar for some episodes more than those with `rewards`, in `progress` where that is running."""
    with nullcontext(progress) if progress else step_progress(console or Console(stderr=True)) as display:
        bar = display.add_task(name, total=len(rewards) + episodes, told="")
        shown = _EpisodeBar(display, bar, list(rewards))
        shown.show()
        try:
            yield shown
        finally:
            if progress:
                progress.remove_task(bar)


def step_progress(console: Console) -> Progress:
    """A bar that counts, and tells of more beside: its tasks have the field `told`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
    )


def _open_run(config: EvalConfig, identity: dict[str, Any]) -> tuple[_Records, _Records]:
    """Writes the run's configuration, or checks it against the one that is there; finished episodes and their costs."""
    path, lines, cost_lines = (config.out / name for name in ("config.json", "episodes.jsonl", "costs.jsonl"))
    if not config.resume:
        if lines.exists() and lines.stat().st_size:
            raise SettingError(f"{config.out} holds a run. Go on with it by --resume, or choose another --out.")
        config.out.mkdir(parents=True, exist_ok=True)
        replace_file(cost_lines, "")  # of one that was stopped before its first episode ended
        replace_file(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        return {}, {}
    check_unchanged(path, identity)
    costs = {cost["episode"]: cost for cost in read_episodes(cost_lines)}
    records = {record["episode"]: record for record in read_episodes(lines) if record["episode"] in costs}
    costs = {position: costs[position] for position in records}
    for file, kept in ((lines, records), (cost_lines, costs)):
        replace_file(file, "".join(map(json_line, kept.values())))
    return records, costs


def check_new(folder: Path, otherwise: str = "") -> None:
    """Whether a run can begin in `folder`; `otherwise` is what to do besides choosing another.

    Raises:
        SettingError: it is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} must be a new or empty folder, and is not. Choose another --out{otherwise}.")


def check_unchanged(path: Path, identity: dict[str, Any]) -> None:
    """Whether the run that is to be resumed is the one that `config.json` at `path` describes.

    Raises:
        SettingError: there is none, or it is another; the message names what differs.
    """
    if not path.is_file():
        raise SettingError(f"Nothing to resume: {path} does not exist. Leave --resume out to start.")
    before = json.loads(path.read_text(encoding="utf-8"))
    told = "; ".join(_differences({name: before.get(name) for name in identity}, identity))
    if told:
        raise SettingError(f"{path.parent} holds a run of another configuration: {told}.")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, in words.

    >>> list(_differences({"seed": 0, "settings": {"top_k": 6, "capacity": None}}, {"seed": 0, "settings": {"top_k": 12}}))
    ['capacity was None, is not given', 'top_k was 6, is 12']
    """
    for name in sorted({*before, *now}):
        old, new = (side.get(name, _ABSENT) for side in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            was, is_ = ("not given" if value is _ABSENT else repr(value) for value in (old, new))
            yield f"{name} was {was}, is {is_}"


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """The finished episodes of an `episodes.jsonl`, in its order; none where there is no file.

    The last line may be half a line, left by a run that was killed. Lines end with "\\n" alone: a prediction can hold other
    characters that Python takes for ends of lines.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of a JSON lines file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Writes a whole file at once: a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def results_table(summaries: list[dict[str, Any]], title: str) -> Table:
    """Summaries as a table for people; fits into 80 columns."""
    table = Table(
        title=title,
        caption=("* is given the golds. " if any(row["privileged"] for row in summaries) else "")
        + "In %: exact match with its interval, evidence stored and in view when its question was settled. "
        "An episode: steps, creates, faults.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("policy", overflow="fold")
    for heading in ("EM", "95 % CI", "stored", "in view", "steps", "creates", "faults"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        low, high = row["em_ci95"]
        recall = row["evidence_recall"]
        table.add_row(
            row["label"] + ("*" if row["privileged"] else ""),
            f"{100 * row['em']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            *("–" if recall[stage] is None else f"{100 * recall[stage]:.1f}" for stage in ("stored", "retrieved")),
            f"{row['steps']:.1f}",
            f"{row['operations'].get('create', 0):.1f}",
            f"{sum(row['faults'].values()):.1f}",
        )
    return table


def main(config: EvalConfig) -> None:
    """Evaluate a policy: a table here, and a folder with every number and every memory entry.

    With RECIPE.toml in the place of ENV_ID: many policies on many environments, see `atommem eval quick.toml --help`.
    """
    summary = evaluate(config)
    title = f"{config.env_id}, {summary['episodes']} episodes, {summary['questions']} questions"
    console = Console()
    console.print(results_table([summary], title))
    memory = "" if config.durability == "off" else ", memory/ (LanceDB)"
    console.print(f"Written to [bold]{config.out}[/]: summary.json, episodes.jsonl, costs.jsonl, config.json{memory}.")
