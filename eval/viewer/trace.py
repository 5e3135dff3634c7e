"""`atommem trace`: a policy's episodes in a run, as one HTML page that needs no network.

    atommem trace runs/oracle

Episodes are replayed from `config.json`, `episodes.jsonl` and the replies and vectors in `memory/`; nothing extra is recorded
for the page. It is built from elements, never from concatenated text, so that the text of a document or a policy cannot become
markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any
from xml.etree.ElementTree import Element, tostring

import tyro

import atommem_env  # noqa: F401  (registers the environments)
from atommem_env.dialects import get_dialect
from atommem_env.episode import Episode, legal_text
from atommem_env.errors import SettingError, StoreError
from atommem_env.make import make_env
from atommem_env.scoring import holds
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord
from atommem_env.store.replay import initial_episode, replay
from atommem_env.types import (
    Evidence,
    Fault,
    Observation,
    Operation,
    OperationKind,
    OperationResult,
    Phase,
    Question,
    QuestionOutcome,
    StepResult,
)
from eval.compare import read_run
from eval.metrics import summarise
from eval.run_folder import require_trusted

MOST_EPISODES = 50  # a larger page is slow to open

_CHANGES = (OperationKind.CREATE, OperationKind.UPDATE, OperationKind.DELETE)

Child = Element | str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceConfig:
    """The run, or episode, to show."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder that `atommem eval` wrote."""
    episode: int | None = None
    """Only this episode: its number in episodes.jsonl, from 0. Default: the first 50."""
    out: Path | None = None
    """File of the page. Default: trace.html, or trace-N.html of one episode, in the run folder."""
    trust: bool = False
    """Import the modules that the run's config.json names; they run code."""


def main(config: TraceConfig) -> None:
    """Write a run, or one episode, as an HTML page."""
    page = trace_page(config.run, config.episode, trust=config.trust)
    name = "trace.html" if config.episode is None else f"trace-{config.episode}.html"
    out = config.out or config.run / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", newline="\n")
    print(f"Written to {out}; open it in a browser.")


def trace_page(run: Path, episode: int | None = None, *, trust: bool = False) -> str:
    """The page (HTML) of a run folder, or of one of its episodes; the same bytes for the same run.

    Raises:
        SettingError: the folder has no run, or no memory (durability off), there is no such episode, or `trust` is off and the
            run names modules other than ours.
        StoreError: the replay of an episode ends differently.
        DatasetNotFound: the run's dataset no longer exists.
    """
    played = read_run(run)
    config, records = played.config, played.records
    require_trusted(config, run / "config.json", trust=trust)
    if config["options"].get("durability") == "off":
        raise SettingError(f"The run in {run} stored no memory (durability off). Run it again without that setting.")
    chosen = [record for record in records if episode in (None, record["episode"])][:MOST_EPISODES]
    if not chosen:
        numbers = f"{records[0]['episode']} to {records[-1]['episode']}"
        raise SettingError(f"No episode {episode} in {run}: expected one of the {len(records)} finished, {numbers}.")
    # Vectors come from the store: the embedder that computed them need not be installed.
    options = {"store": str(run / "memory"), **config["options"], "durability": "off", "embedder": "hashing"}
    env = make_env(config["env_id"], **options)
    # Of two with the same key, the later one is in episodes.jsonl: the run was killed after the first had been committed.
    stored = {(row.task_id, row.episode_seed): row for row in env.store.episodes() if row.status != INTERRUPTED}
    items, articles = [], []
    for record in chosen:
        row = stored.get((record["task_id"], record["seed"]))
        if row is None:
            raise SettingError(
                f"The memory of episode {record['episode']} is not in {env.store.folder}; run `atommem eval` again, "
                "with durability on and into another folder."
            )
        replayed = _Replay(record["episode"], initial_episode(row, env.source, env.settings), env.store, row)
        replayed.check(record)
        items.append(_list_item(record, replayed))
        articles.append(_episode(record, replayed))
    env.close()
    note = ""
    if episode is not None:
        note = f"This page shows only episode {episode} of {len(records)}; the figures are of all."
    elif len(chosen) < len(records):
        note = f"The first {len(chosen)} of {len(records)} episodes are on this page; --episode N shows any other."
    return _fill(
        title=f"{config['policy']} on {config['env_id']}",
        summary=[*_summary(config, records), *([_node("p", "notice", note)] if note else [])],
        items=items,
        articles=articles,
    )


# ---------------------------------------------------------------------------------------------------------------- reading


class _Replay:
    """A replayed episode; lists have an item for each reply, in order."""

    def __init__(self, number: int, episode: Episode, store: MemoryStore, row: EpisodeRecord) -> None:
        self.number = number
        self.episode = episode
        self.observations: list[Observation] = []  # before each reply
        self.replies: list[str] = []
        self.results: list[StepResult] = []
        self.sizes = [0]  # entries in memory, before the first reply and after each
        self.stored: list[str] = []  # text of memory and scratchpad after each reply
        self.resolved_at: list[int] = []  # for each question, the index of the reply that resolved it
        observation = episode.observe()
        for reply, result in replay(episode, store, row.episode_id):
            self.observations.append(observation)
            self.replies.append(reply)
            self.results.append(result)
            self.sizes.append(len(episode.memory))
            self.stored.append(episode.stored_text())
            self.resolved_at += [len(self.stored) - 1] * (len(episode.outcomes) - len(self.resolved_at))
            observation = result.observation
        numbers: dict[str, list[str]] = {}  # passage → numbers of the questions that it supports
        for number, question in enumerate(episode.task.questions, start=1):
            for passage in question.evidence:
                numbers.setdefault(passage.text, []).append(str(number))
        self._patterns = [
            (re.compile(r"\s+".join(map(re.escape, text.split()))), f"evidence of question {', '.join(questions)}")
            for text, questions in numbers.items()
        ]

    def check(self, record: dict[str, Any]) -> None:
        """Checks that the replay ended as the episode's line of `episodes.jsonl` says."""
        names = ("prediction", "em", "stored", "retrieved")
        recorded = [str(record["stop_reason"]), *([line[name] for name in names] for line in record["questions"])]
        played = [
            str(self.episode.stop_reason),
            *([getattr(outcome, name) for name in names] for outcome in self.episode.outcomes),
        ]
        if recorded != played:
            raise StoreError(
                f"Episode {self.number} ended with {recorded} and, played again, with {played}: the data, or the version of "
                "atommem, are not those of the run. Use those, or run it again."
            )

    def anchor(self, index: int) -> str:
        """The id of a reply's section on the page."""
        return f"e{self.number}s{index + 1}"

    def link(self, index: int) -> Element:
        return _node("a", "", f"step {index + 1}", href=f"#{self.anchor(index)}")

    def mark_evidence(self, text: str) -> list[Child]:
        """The text with its evidence marked."""
        spans = sorted(
            (match.start(), match.end(), label) for pattern, label in self._patterns for match in pattern.finditer(text)
        )
        parts: list[Child] = []
        position = 0
        for start, end, label in spans:
            start = max(start, position)  # passages can overlap
            if start < end:
                parts += [text[position:start], _node("mark", "", text[start:end], title=label)]
                position = end
        return [*parts, text[position:]]


# ---------------------------------------------------------------------------------------------------------------- the page


def _node(tag: str, css: str, *children: Child, **attributes: str) -> Element:
    element = Element(tag, {"class": css} if css else {}, **attributes)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + legal_text(child)[0]
        else:
            element.text = (element.text or "") + legal_text(child)[0]
    return element


def _text(*children: Child) -> Element:
    """Text with its line breaks."""
    return _node("div", "text", *children)


def _details(summary: str, *children: Child) -> Element:
    return _node("details", "", _node("summary", "", summary), *children)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Element:
    return _node("dl", "", *(_node("div", "", _node("dt", "", name), _node("dd", "", value)) for name, value in pairs))


def _fill(title: str, summary: list[Element], items: list[Element], articles: list[Element]) -> str:
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def html(elements: Sequence[Element]) -> str:
        return "\n".join(tostring(element, encoding="unicode", method="html") for element in elements)

    def digest(tag: str) -> str:
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    return Template(template).substitute(
        policy=f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')}",
        title=html([_node("title", "", title)]),
        heading=html([_node("h1", "", title)]),
        summary=html(summary),
        items=html(items),
        articles=html(articles),
    )


def _summary(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[Element]:
    figures = summarise(records)

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.1f} %"

    def means(name: str) -> str:
        return ", ".join(f"{kind} {mean:.1f}" for kind, mean in figures[name].items()) or "none"

    interval = "–".join(f"{100 * end:.1f}" for end in figures["em_ci95"] or ())
    recall = figures["evidence_recall"]
    stats = [
        ("episodes", f"{figures['episodes']} of {config['episodes']}"),
        ("questions", str(figures["questions"])),
        ("exact match", f"{percent(figures['em'])} (95 % CI {interval or '–'})"),
        ("F1", percent(figures["f1"])),
        ("evidence stored", percent(recall["stored"])),
        ("evidence in view", percent(recall["retrieved"])),
        ("steps per episode", f"{figures['steps']:.1f}"),
        ("operations per episode", means("operations")),
        ("faults per episode", means("faults")),
        ("ended", ", ".join(f"{reason} {count}" for reason, count in figures["stop_reasons"].items())),
    ]
    flat = {**config, **config["sampling"], **config["options"], **config["settings"]}
    settings = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in flat.items()
        if name not in ("sampling", "options", "settings")
    ]
    return [_pairs(stats), _details("Settings", _pairs(settings))]


def _verdict(em: float | None) -> str:
    if em is None:
        return "ungraded"
    return "right" if em == 1 else "wrong"


def _em(em: float | None) -> Element:
    return _node("span", f"chip {_verdict(em)}", "EM –" if em is None else f"EM {em:.2g}")


def _list_item(record: dict[str, Any], replayed: _Replay) -> Element:
    facts = f" #{record['episode']} · {record['steps']} steps · {record['stop_reason']}"
    questions = " / ".join(question.text for question in replayed.episode.task.questions)
    link = _node(
        "a", "", _em(record["reward"]), facts, _node("span", "question", questions), href=f"#e{record['episode']}"
    )
    return _node("li", _verdict(record["reward"]), link)


def _episode(record: dict[str, Any], replayed: _Replay) -> Element:
    episode = replayed.episode
    questions = [_question(replayed, index) for index in range(len(episode.outcomes))]
    entries = [
        _node("li", "op", _node("b", "", entry.id), _text(*replayed.mark_evidence(entry.text)))
        for entry in episode.memory.entries()
    ]
    article = _node(
        "article",
        "",
        _node("p", "dim", f"task {record['task_id']} · seed {record['seed']} · {len(episode.chunks)} chunks"),
        _node("ol", "asked", *(_node("li", "", question.text) for question in episode.task.questions)),
        *_sparkline(replayed.sizes),
        *_steps(replayed),
        _node("h3", "", "Questions"),
        *questions,
        _details(f"Memory at the end · entries: {len(entries)}", _node("ul", "", *entries)),
        id=f"e{record['episode']}",
    )
    title = f" Episode {record['episode']} · {record['steps']} steps · {record['stop_reason']}"
    summary = _node("summary", "", _em(record["reward"]), title)
    # The id is on the inner element: a browser unfolds the elements around the target of a link.
    return _node("details", f"episode {_verdict(record['reward'])}", summary, article)


def _sparkline(sizes: Sequence[int]) -> list[Element]:
    """The number of entries over the steps, as a picture and in words."""
    most = max(sizes)
    caption = f"Entries in memory over {len(sizes) - 1} steps: {sizes[-1]} at the end, {most} at most."
    points = [f"{step},{100 - 100 * size / max(most, 1):.4g}" for step, size in enumerate(sizes)]
    picture = _node(
        "svg",
        "",
        _node("polygon", "", points=" ".join(["0,100", *points, f"{len(sizes) - 1},100"])),
        _node("polyline", "", points=" ".join(points)),
        viewBox=f"0 0 {len(sizes) - 1} 100",
        preserveAspectRatio="none",
        role="img",
    )
    picture.set("aria-label", caption)
    return [_node("figure", "", picture, _node("figcaption", "dim", caption))]


def _steps(replayed: _Replay) -> list[Element]:
    last_shown: dict[str, tuple[str, int]] = {}
    texts: dict[str, str] = {}  # of the entries in memory
    sections = []
    for index, (observation, result) in enumerate(zip(replayed.observations, replayed.results, strict=True)):
        reading = observation["phase"] == Phase.READ
        faults = sum(item.fault is not None for item in result.results)
        before, after = replayed.sizes[index : index + 2]
        heading: list[Child] = [f"Step {index + 1} · {'reading' if reading else 'answering'}"]
        if faults:
            heading += [" ", _node("span", "chip fault", f"{faults} fault{'s' * (faults > 1)}")]
        heading += [_node("span", "dim", f" memory {before} → {after}" if before != after else f" memory {after}")]
        sections.append(
            _node(
                "section",
                "",
                _node("h3", "", *heading),
                _node("div", "sees", _node("h4", "", "Observation"), *_observation(replayed, index, last_shown)),
                _node("div", "does", _node("h4", "", "Operations"), *_reply(replayed, index, texts)),
                id=replayed.anchor(index),
            )
        )
    return sections


def _observation(replayed: _Replay, index: int, last_shown: dict[str, tuple[str, int]]) -> list[Element]:
    observation = replayed.observations[index]
    elements: list[Element] = []
    if observation["question"]:
        elements.append(_node("p", "asks", observation["question"]))
    if observation["chunk"]:
        parts = replayed.mark_evidence(observation["chunk"])
        passages = [part for part in parts if isinstance(part, Element)]
        count = f"evidence: {len(passages)}"
        elements.append(_details(f"Chunk · {len(observation['chunk']):,} characters · {count}", _text(*parts)))
        elements += [_node("p", "", _node("mark", "", passage.text or "")) for passage in passages]
    if observation["notice"]:
        elements += [_node("h5", "", "notice"), _node("div", "text notice", observation["notice"])]
    values = {name: observation[name] for name in ("scratchpad", "query", "retrieved")}
    for name, value in values.items():
        known, since = last_shown.get(name, ("", 0))
        if value and value == known:  # shown once: most of a page would be repetition
            elements.append(_node("h5", "", f"{name} ", _node("span", "", "as in ", replayed.link(since))))
        elif value:
            elements += [_node("h5", "", name), _text(*replayed.mark_evidence(value))]
            last_shown[name] = (value, index)
    return elements


def _reply(replayed: _Replay, index: int, texts: dict[str, str]) -> list[Element]:
    """The operations in the order written, what each changed, and the reply itself. Updates `texts`."""
    reply, result = legal_text(replayed.replies[index])[0], replayed.results[index]
    written = get_dialect(replayed.episode.settings.dialect).parse(reply)
    first = sum(item.fault is Fault.ILLEGAL_TEXT for item in result.results)  # it precedes all operations
    mutations = iter(result.mutations)
    operations = []
    for item, outcome in zip(written, result.results[first:], strict=False):
        done = outcome.fault in (None, Fault.TRUNCATED)
        content: list[Element] = []
        if done and item.kind in (*_CHANGES, OperationKind.READ):
            mutation = next(mutations)
            old = texts.pop(mutation.entry_id, None)
            if mutation.kind in (OperationKind.CREATE, OperationKind.UPDATE):
                texts[mutation.entry_id] = mutation.text
            if old is not None:
                content.append(_node("del", "text", *replayed.mark_evidence(old)))
            if mutation.kind is not OperationKind.DELETE:
                tag = "ins" if mutation.kind is OperationKind.UPDATE else "div"
                content.append(_node(tag, "text", *replayed.mark_evidence(mutation.text)))
        elif isinstance(item, Operation) and (item.text or item.target):
            content.append(_text(*replayed.mark_evidence(": ".join(filter(None, (item.target, item.text))))))
        operations.append(_operation(outcome, content))
    rest = (*result.results[:first], *result.results[first + len(written) :])
    operations += [_operation(outcome, []) for outcome in rest]
    if not operations:
        operations = [_node("li", "dim", "none: there is no operation in the reply")]
    raw = _details(f"Reply as written · {len(reply):,} characters", _text(*replayed.mark_evidence(reply)))
    return [_node("ul", "", *operations), *([raw] if reply else [])]


def _operation(outcome: OperationResult, content: list[Element]) -> Element:
    kind = str(outcome.kind or "reply")
    head: list[Child] = [_node("span", f"chip {kind}", kind)]
    if outcome.entry_id:
        head += [" ", _node("b", "", outcome.entry_id)]
    if outcome.fault is not None:
        head += [" ", _node("span", "chip fault", str(outcome.fault)), " ", _node("span", "dim", outcome.detail)]
    return _node("li", f"op {kind}" + (" faulty" if outcome.fault else ""), *head, *content)


def _question(replayed: _Replay, index: int) -> Element:
    question: Question = replayed.episode.task.questions[index]
    outcome: QuestionOutcome = replayed.episode.outcomes[index]
    gold, *aliases = question.answers or ("none",)
    facts = [
        ("gold", gold + (f" (also: {'; '.join(aliases)})" if aliases else "")),
        ("prediction", "– (unanswered)" if outcome.prediction is None else outcome.prediction),
        ("F1", "–" if outcome.f1 is None else f"{outcome.f1:.2f}"),
        ("evidence", f"{outcome.stored} of {outcome.evidence} stored, {outcome.retrieved} in view"),
        ("kind", f"{question.kind} · hops: {question.hops}"),
    ]
    return _node(
        "section",
        f"outcome {_verdict(outcome.em)}",
        _node("h4", "", _em(outcome.em), f" {question.text} ", replayed.link(replayed.resolved_at[index])),
        _pairs(facts),
        _node("ul", "", *(_evidence(replayed, passage, replayed.resolved_at[index]) for passage in question.evidence)),
    )


def _evidence(replayed: _Replay, passage: Evidence, last: int) -> Element:
    """Where a passage was shown, stored and lost, up to the reply with the index `last`, which resolved its question."""
    before, after = replayed.observations[: last + 1], replayed.stored[: last + 1]
    shown_at = [index for index, observation in enumerate(before) if holds(observation["chunk"], passage.text)]
    stored_at = [index for index, text in enumerate(after) if holds(text, passage.text)]
    in_view = holds(before[last]["scratchpad"] + "\n" + before[last]["retrieved"], passage.text)
    lost = bool(stored_at) and stored_at[-1] != last

    def stage(good: bool, *children: Child) -> Element:
        return _node("span", f"stage {'right' if good else 'wrong'}", *children)

    stored = stage(False, "never stored in these words")
    if stored_at:
        removed: list[Child] = [", removed in ", replayed.link(stored_at[-1] + 1)] if lost else []
        stored = stage(not lost, "stored in ", replayed.link(stored_at[0]), *removed)
    return _node(
        "li",
        "",
        _node("div", "", _node("b", "", passage.title), " ", _node("mark", "", passage.text)),
        stage(True, "shown in ", replayed.link(shown_at[0])) if shown_at else stage(False, "never shown in one piece"),
        stored,
        stage(in_view, "in view" if in_view else "not in view", " when resolved"),
    )
