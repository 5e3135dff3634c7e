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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from atommem_env.paths import replacing
from atommem_env.scoring import holds
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord
from atommem_env.store.replay import initial_episode, replay
from atommem_env.terminal import printable
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
    Task,
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
    parts = page_parts(config.run, config.episode, trust=config.trust)
    name = "trace.html" if config.episode is None else f"trace-{config.episode}.html"
    out = config.out or config.run / name
    first = next(parts)  # an error comes before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(first)
        file.writelines(parts)
    print(f"Written to {printable(str(out))}; open it in a browser.")


def page_parts(run: Path, episode: int | None = None, *, trust: bool = False) -> Iterator[str]:
    """The page (HTML) of a run folder, or of one of its episodes, in parts; the same bytes for the same run.

    Args:
        trust: imports the modules that the run's configuration names, which runs their code.

    Raises:
        SettingError: the folder has no run, no memory (durability off), or no such episode, or names modules without `trust`.
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
    pairs = []
    for record in chosen:
        row = stored.get((record["task_id"], record["seed"]))
        if row is None:
            raise SettingError(
                f"The memory of episode {record['episode']} is not in {env.store.folder}; run `atommem eval` again, "
                "with durability on and into another folder."
            )
        pairs.append((record, row))
    note = ""
    if episode is not None:
        note = f"This page shows only episode {episode} of {len(records)}; the figures are of all."
    elif len(chosen) < len(records):
        note = f"The first {len(chosen)} of {len(records)} episodes are on this page; --episode N shows any other."
    before, after = _frame(
        title=f"{config['policy']} on {config['env_id']}",
        summary=[*_summary(config, records), *([_node("p", "notice", note)] if note else [])],
        items=[_list_item(record, env.source.task(row.index, row.task_seed)) for record, row in pairs],
    )
    yield before
    for number, (record, row) in enumerate(pairs):
        if number:
            yield "\n"
        yield from _episode(record, initial_episode(row, env.source, env.settings), env.store, row)
    yield after
    env.close()


# ---------------------------------------------------------------------------------------------------------------- reading


@dataclass(slots=True)
class _Passage:
    """Where a passage was shown and stored so far, as indices of replies."""

    shown_at: int | None = None
    stored_at: int | None = None
    last_stored_at: int | None = None
    in_view: bool = False  # before the last reply
    entries: frozenset[str] = frozenset()  # ids of those that hold it


class _Replay:
    """An episode as it is replayed; of a step nothing stays but what the page says after the steps."""

    def __init__(self, number: int, episode: Episode, store: MemoryStore, row: EpisodeRecord) -> None:
        self.number = number
        self.episode = episode
        self._replies = replay(episode, store, row.episode_id)
        self.sizes = [0]  # entries in memory, before the first reply and after each
        self.resolved_at: list[int] = []  # for each question, the index of the reply that resolved it
        self.evidence: list[list[_Passage]] = []  # for each question, its passages as they were then
        self._passages: dict[str, _Passage] = {}
        numbers: dict[str, list[str]] = {}  # passage → numbers of the questions that it supports
        for number, question in enumerate(episode.task.questions, start=1):
            for passage in question.evidence:
                numbers.setdefault(passage.text, []).append(str(number))
                self._passages[passage.text] = _Passage()
        self._patterns = [
            (re.compile(r"\s+".join(map(re.escape, text.split()))), f"evidence of question {', '.join(questions)}")
            for text, questions in numbers.items()
        ]

    def steps(self) -> Iterator[tuple[Observation, str, StepResult]]:
        """Replays the episode: what was observed before each reply, the reply, and its result."""
        observation = self.episode.observe()
        for index, (reply, result) in enumerate(self._replies):
            self.sizes.append(len(self.episode.memory))
            for text, passage in self._passages.items():
                self._follow(index, text, passage, observation, result)
            for question in self.episode.task.questions[len(self.resolved_at) : len(self.episode.outcomes)]:
                self.resolved_at.append(index)
                self.evidence.append([replace(self._passages[passage.text]) for passage in question.evidence])
            yield observation, reply, result
            observation = result.observation

    def _follow(self, index: int, text: str, passage: _Passage, observation: Observation, result: StepResult) -> None:
        if passage.shown_at is None and holds(observation["chunk"], text):
            passage.shown_at = index
        for mutation in result.mutations:
            if mutation.kind is not OperationKind.READ:
                there = mutation.kind is not OperationKind.DELETE and holds(mutation.text, text)
                passage.entries = (
                    (passage.entries | {mutation.entry_id}) if there else passage.entries - {mutation.entry_id}
                )
        if passage.entries or holds(self.episode.scratchpad, text):
            passage.stored_at = index if passage.stored_at is None else passage.stored_at
            passage.last_stored_at = index
        passage.in_view = holds(observation["scratchpad"] + "\n" + observation["retrieved"], text)

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
            element[-1].tail = (element[-1].tail or "") + _legible(child)
        else:
            element.text = (element.text or "") + _legible(child)
    return element


def _legible(text: str) -> str:
    """Text without what no file can hold, and with what would reorder or hide other text as visible escapes."""
    return printable(legal_text(text)[0])


def _text(*children: Child) -> Element:
    """Text with its line breaks."""
    return _node("div", "text", *children)


def _details(summary: str, *children: Child) -> Element:
    return _node("details", "", _node("summary", "", summary), *children)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Element:
    return _node("dl", "", *(_node("div", "", _node("dt", "", name), _node("dd", "", value)) for name, value in pairs))


def _html(elements: Sequence[Element]) -> str:
    return "\n".join(tostring(element, encoding="unicode", method="html") for element in elements)


def _frame(title: str, summary: list[Element], items: list[Element]) -> tuple[str, str]:
    """What of the page comes before the episodes, and after them."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    before, after = (Template(part) for part in template.split("$articles"))
    return before.substitute(
        policy=f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')}",
        title=_html([_node("title", "", title)]),
        heading=_html([_node("h1", "", title)]),
        summary=_html(summary),
        items=_html(items),
    ), after.substitute()


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


def _list_item(record: dict[str, Any], task: Task) -> Element:
    facts = f" #{record['episode']} · {record['steps']} steps · {record['stop_reason']}"
    questions = " / ".join(question.text for question in task.questions)
    link = _node(
        "a", "", _em(record["reward"]), facts, _node("span", "question", questions), href=f"#e{record['episode']}"
    )
    return _node("li", _verdict(record["reward"]), link)


def _episode(record: dict[str, Any], episode: Episode, store: MemoryStore, row: EpisodeRecord) -> Iterator[str]:
    """An episode on the page; its steps are text as soon as they are replayed, elements take ten times the memory."""
    replayed = _Replay(record["episode"], episode, store, row)
    steps = [_html([section]) for section in _steps(replayed)]
    replayed.check(record)
    questions = [_question(replayed, index) for index in range(len(episode.outcomes))]
    entries = [
        _node("li", "op", _node("b", "", entry.id), _text(*replayed.mark_evidence(entry.text)))
        for entry in episode.memory.entries()
    ]
    gap = Element("template")  # where the steps go: the page has no other
    article = _node(
        "article",
        "",
        _node("p", "dim", f"task {record['task_id']} · seed {record['seed']} · {len(episode.chunks)} chunks"),
        _node("ol", "asked", *(_node("li", "", question.text) for question in episode.task.questions)),
        *_sparkline(replayed.sizes),
        gap,
        _node("h3", "", "Questions"),
        *questions,
        _details(f"Memory at the end · entries: {len(entries)}", _node("ul", "", *entries)),
        id=f"e{record['episode']}",
    )
    title = f" Episode {record['episode']} · {record['steps']} steps · {record['stop_reason']}"
    summary = _node("summary", "", _em(record["reward"]), title)
    # The id is on the inner element: a browser unfolds the elements around the target of a link.
    whole = _node("details", f"episode {_verdict(record['reward'])}", summary, article)
    before, after = _html([whole]).split(_html([gap]))
    yield before
    yield from steps
    yield after


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


def _steps(replayed: _Replay) -> Iterator[Element]:
    last_shown: dict[str, tuple[str, int]] = {}
    texts: dict[str, str] = {}  # of the entries in memory
    for index, (observation, reply, result) in enumerate(replayed.steps()):
        reading = observation["phase"] == Phase.READ
        faults = sum(item.fault is not None for item in result.results)
        before, after = replayed.sizes[-2:]
        heading: list[Child] = [f"Step {index + 1} · {'reading' if reading else 'answering'}"]
        if faults:
            heading += [" ", _node("span", "chip fault", f"{faults} fault{'s' * (faults > 1)}")]
        heading += [_node("span", "dim", f" memory {before} → {after}" if before != after else f" memory {after}")]
        seen = _observation(replayed, index, observation, last_shown)
        yield _node(
            "section",
            "",
            _node("h3", "", *heading),
            _node("div", "sees", _node("h4", "", "Observation"), *seen),
            _node("div", "does", _node("h4", "", "Operations"), *_reply(replayed, reply, result, texts)),
            id=replayed.anchor(index),
        )


def _observation(
    replayed: _Replay, index: int, observation: Observation, last_shown: dict[str, tuple[str, int]]
) -> list[Element]:
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


def _reply(replayed: _Replay, reply: str, result: StepResult, texts: dict[str, str]) -> list[Element]:
    """The operations in the order written, what each changed, and the reply itself. Updates `texts`."""
    reply = legal_text(reply)[0]
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
        _node("ul", "", *(_evidence(replayed, index, number) for number in range(len(question.evidence)))),
    )


def _evidence(replayed: _Replay, index: int, number: int) -> Element:
    """Where a passage of a question was shown, stored and lost, up to the reply that resolved the question."""
    passage: Evidence = replayed.episode.task.questions[index].evidence[number]
    seen = replayed.evidence[index][number]

    def stage(good: bool, *children: Child) -> Element:
        return _node("span", f"stage {'right' if good else 'wrong'}", *children)

    shown = stage(False, "never shown in one piece")
    if seen.shown_at is not None:
        shown = stage(True, "shown in ", replayed.link(seen.shown_at))
    stored = stage(False, "never stored in these words")
    if seen.stored_at is not None and seen.last_stored_at is not None:
        lost = seen.last_stored_at != replayed.resolved_at[index]
        removed: list[Child] = [", removed in ", replayed.link(seen.last_stored_at + 1)] if lost else []
        stored = stage(not lost, "stored in ", replayed.link(seen.stored_at), *removed)
    return _node(
        "li",
        "",
        _node("div", "", _node("b", "", passage.title), " ", _node("mark", "", passage.text)),
        shown,
        stored,
        stage(seen.in_view, "in view" if seen.in_view else "not in view", " when resolved"),
    )
