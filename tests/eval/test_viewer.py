import json
import re
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from atommem_env.cli import main as atommem
from atommem_env.env import AtomMemEnv
from atommem_env.errors import DataError, PluginError, SettingError, StoreError
from eval.options import EvalConfig
from eval.run import evaluate
from eval.viewer.trace import MOST_EPISODES, TraceConfig, main, page_parts

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """The page as elements; rejects an element that is not closed, or closed in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def with_class(self, *names: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.tags if set(names) <= set(attrs.get("class", "").split())]

    def within(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    @property
    def steps(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section" and "id" in attrs]


def run(folder: Path, policy: str = "random", **changes: Any) -> list[dict[str, Any]]:
    """Evaluates; the lines of episodes.jsonl."""
    options = {"env_id": "AtomMem-Synthetic", "episodes": 3, "questions": 2, **changes}
    evaluate(EvalConfig(out=folder, policy=policy, **options))
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def trace_page(folder: Path, episode: int | None = None) -> str:
    return "".join(page_parts(folder, episode))


POLICIES = r"""
def hostile(observation):
    "Markup, and characters that no file can hold, wherever a policy can write."
    if observation["phase"] == "answer":
        return "<final_answer></div><script>alert('answer')</script></final_answer>"
    if observation["step"] == 0:
        return (
            "<create_memory></article><script>alert('entry')</script> \ud800\x00 &amp;</create_memory>"
            "<read_memory><img src=x onerror=alert(1)></read_memory>"
        )
    if observation["step"] == 1:
        return "<update_memory>m1: newer</update_memory><update_scratchpad></details><svg onload=alert(2)></update_scratchpad>"
    return "<delete_memory>m1</delete_memory><delete_memory>\"><b onclick='alert(3)'></delete_memory><b>thought</b>"


def forgetful(observation):
    "Keeps every chunk for one step."
    if observation["phase"] == "answer":
        return "<final_answer>unknown</final_answer>"
    forget = f"<delete_memory>m{observation['step']}</delete_memory>"
    return f"<create_memory>{observation['chunk']}</create_memory>{forget}"
"""


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a module `viewer_policies` of `POLICIES`."""
    (tmp_path / "viewer_policies.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_page_has_every_step_of_every_episode_and_the_verdicts(tmp_path: Path) -> None:
    records = run(tmp_path / "run")
    page = Page(trace_page(tmp_path / "run"))
    assert page.steps == [
        f"e{record['episode']}s{step}" for record in records for step in range(1, record["steps"] + 1)
    ]
    wrong = sum(record["reward"] < 1 for record in records)
    assert wrong
    assert len(page.with_class("episode", "wrong")) == wrong
    assert len(page.with_class("op", "faulty")) == sum(sum(record["faults"].values()) for record in records)
    for record in records:
        for question in record["questions"]:
            assert ("– (unanswered)" if question["prediction"] is None else question["prediction"]) in page.within("dd")


def test_evidence_is_marked_and_followed_through_the_oracles_memory(tmp_path: Path) -> None:
    records = run(tmp_path / "run", "oracle", episodes=2)
    html = trace_page(tmp_path / "run")
    page = Page(html)
    marked = re.findall(r'<mark title="evidence of question [12, ]+">([^<]+)</mark>', html)
    assert len(page.with_class("episode", "right")) == 2
    assert not page.with_class("episode", "wrong")
    env = gym.make("AtomMem-Synthetic", questions=2, store=tmp_path / "run" / "memory", durability="off").unwrapped
    assert isinstance(env, AtomMemEnv)
    for row in env.store.episodes():
        for question in env.source.task(row.index, row.task_seed).questions:
            # In the chunk, in the entry created and in the reply itself, at least.
            assert all(marked.count(passage.text) >= 3 for passage in question.evidence)
            assert question.text in page.within("li")  # among those asked
    passages = sum(question["evidence"] for record in records for question in record["questions"])
    assert len(page.with_class("stage", "right")) == 3 * passages  # shown, stored, in view
    assert not page.with_class("stage", "wrong")


@pytest.mark.usefixtures("policies")
@pytest.mark.parametrize("policy", ["silent", "random", "perfect-rag", "viewer_policies:forgetful"])
def test_where_evidence_was_lost_is_told_as_the_environment_counted_it(tmp_path: Path, policy: str) -> None:
    records = run(tmp_path / "run", policy, episodes=4, set=("top_k=1",))
    questions = [question for record in records for question in record["questions"]]
    text = "".join(text for _, text in Page(trace_page(tmp_path / "run")).texts)
    removed = len(re.findall(r"stored in step \d+, removed in step \d+", text))
    assert text.count("never stored in these words") + removed == sum(q["evidence"] - q["stored"] for q in questions)
    assert text.count("not in view when resolved") == sum(q["evidence"] - q["retrieved"] for q in questions)
    assert bool(removed) == (policy == "viewer_policies:forgetful")


@pytest.mark.usefixtures("policies")
def test_what_a_policy_writes_never_becomes_markup(tmp_path: Path) -> None:
    run(tmp_path / "plain", "silent", episodes=1)
    ordinary = {tag for tag, _ in Page(trace_page(tmp_path / "plain")).tags} | {"ins", "del"}
    run(tmp_path / "run", "viewer_policies:hostile", episodes=1)
    html = trace_page(tmp_path / "run")
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= ordinary
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    all_text = "".join(text for _, text in page.texts)
    for text in (
        "</article><script>alert('entry')</script> \ufffd\ufffd &amp;",
        "<img src=x",
        "</details><svg",
        '"><b',
    ):
        assert text in all_text
    # created, replaced by another text, and deleted: the old texts are crossed out
    crossed = page.within("del")
    assert crossed == ["</article><script>alert('entry')</script> \ufffd\ufffd &amp;", "newer"]
    assert "newer" in page.within("ins")
    assert "unknown_id" in page.within("span")
    html.encode("utf-8")


def test_nothing_is_fetched_and_no_other_script_may_run(tmp_path: Path) -> None:
    run(tmp_path / "run", episodes=1)
    page = Page(trace_page(tmp_path / "run"))
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "action")]
    assert all(link.startswith("#e") for link in links)
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links} <= targets
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_same_run_gives_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    pages = []
    for name in "ab":
        run(tmp_path / name, in_flight=1 if name == "b" else 64)
        main(TraceConfig(run=tmp_path / name))
        pages.append((tmp_path / name / "trace.html").read_bytes())
    assert pages[0] == pages[1] == trace_page(tmp_path / "a").encode()


def test_twenty_episodes_are_a_small_page(tmp_path: Path) -> None:
    run(tmp_path / "run", "perfect-rag", episodes=20, questions=1)
    assert len(trace_page(tmp_path / "run").encode()) < 1_000_000


def test_a_long_episode_needs_no_more_memory_than_a_few_pages(tmp_path: Path) -> None:
    run(tmp_path / "run", "perfect-rag", episodes=1, set=("num_docs=400", "chunk_tokens=48"))
    tracemalloc.start()
    try:
        size = len(trace_page(tmp_path / "run"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * size  # 26 with the memory after each reply, which grows with the square of the replies


def test_one_episode_alone_and_no_more_than_the_first_fifty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = run(tmp_path / "run", "silent", episodes=MOST_EPISODES + 2, questions=1)
    html = trace_page(tmp_path / "run")
    assert len(Page(html).with_class("episode")) == MOST_EPISODES
    assert f"The first {MOST_EPISODES} of {MOST_EPISODES + 2} episodes" in html
    main(TraceConfig(run=tmp_path / "run", episode=51, out=tmp_path / "new" / "one.html"))
    assert "one.html" in capsys.readouterr().out
    one = Page((tmp_path / "new" / "one.html").read_text(encoding="utf-8"))
    assert one.steps == [f"e51s{step}" for step in range(1, records[51]["steps"] + 1)]
    with pytest.raises(SettingError, match="0 to 51"):
        trace_page(tmp_path / "run", 52)


def test_a_folder_that_cannot_be_shown_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="atommem eval --out"):
        trace_page(tmp_path)
    run(tmp_path / "off", episodes=1, durability="off")
    with pytest.raises(SettingError, match="durability off"):
        trace_page(tmp_path / "off")
    run(tmp_path / "moved", episodes=1)
    (tmp_path / "moved" / "memory").rename(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="run `atommem eval` again"):
        trace_page(tmp_path / "moved")
    (tmp_path / "elsewhere").rename(tmp_path / "moved" / "memory")
    lines = tmp_path / "moved" / "episodes.jsonl"
    lines.write_text(re.sub(r'"stored": \d+', '"stored": 9', lines.read_text()))
    with pytest.raises(StoreError, match="played again"):
        trace_page(tmp_path / "moved")
    lines.write_text('{"episode": 0')  # killed in its first line
    with pytest.raises(SettingError, match="--resume"):
        trace_page(tmp_path / "moved")


@pytest.mark.usefixtures("policies")
def test_a_foreign_run_folder_runs_no_code_without_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign_module.py").write_text("raise SystemExit('this code ran')\n")
    run(tmp_path / "run", episodes=1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for change in (
        {"env_id": "foreign_module:AtomMem-Synthetic"},
        {"layout": "foreign_module:part"},
        *(
            {"options": {name: "foreign_module:part"}}
            for name in ("source", "dialect", "reward", "embedder", "scoring")
        ),
        {"options": {"reward_terms": {"foreign_module:part": 0.1}}},
        {"settings": config["settings"] | {"dialect": "foreign_module:part"}},
    ):
        path.write_text(json.dumps(config | change))
        monkeypatch.setattr("sys.argv", ["atommem", "trace", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as ended:
            atommem()
        assert ended.value.code == 1
        assert "names foreign_module, and importing a module runs its code" in capsys.readouterr().err
        assert "foreign_module" not in sys.modules
    path.write_text(json.dumps(config | {"env_id": "foreign_module:AtomMem-Synthetic"}))
    with pytest.raises(PluginError, match="this code ran"):
        [*page_parts(tmp_path / "run", trust=True)]


def test_own_parts_are_shown_with_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "viewer_rewards.py").write_text("def brief(outcome):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path / "run", episodes=1, reward="viewer_rewards:brief")
    with pytest.raises(SettingError, match="viewer_rewards"):
        trace_page(tmp_path / "run")
    assert Page("".join(page_parts(tmp_path / "run", trust=True))).steps


def test_controls_and_marks_of_direction_are_visible_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def policy(observation):\n    return '<create_memory>a\\u202eb\\x1bc\\x00d</create_memory>'\n"
    (tmp_path / "viewer_marks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path / "run", "viewer_marks:policy", episodes=1)
    html = trace_page(tmp_path / "run")
    assert "a\\u202eb\\x1bc\ufffdd" in html
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limit on the size of files")
def test_a_full_disk_leaves_the_old_page(tmp_path: Path) -> None:
    import resource

    run(tmp_path / "run", episodes=1)
    main(TraceConfig(run=tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            main(TraceConfig(run=tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "run" / "trace.html")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["config.json", "episodes.jsonl", "summary.json"])
def test_a_damaged_run_folder_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    run(tmp_path / "run", "silent", episodes=1, questions=1)
    path = tmp_path / "run" / name
    data = path.read_bytes()
    assert trace_page(tmp_path / "run")
    for content in (
        b"",
        b"[1]\n",
        b"{}\n",
        b"\xff\xfe\n",
        data[: len(data) // 2] + b"\n",
        data[::-1] + b"\n",
        b'{"a": NaN}\n',
    ):
        path.write_bytes(content)
        with pytest.raises((DataError, SettingError), match=str(tmp_path / "run")):
            trace_page(tmp_path / "run")


def test_an_embedder_that_is_not_installed_is_not_needed(tmp_path: Path) -> None:
    run(tmp_path / "run", episodes=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    before = trace_page(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config | {"options": {"questions": 2, "embedder": "gone"}})
    )
    assert Page(trace_page(tmp_path / "run")).steps == Page(before).steps


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", episodes=2)
    monkeypatch.setattr("sys.argv", ["atommem", "trace", str(tmp_path / "run"), "--episode", "1"])
    atommem()
    assert "trace-1.html" in capsys.readouterr().out
    assert (tmp_path / "run" / "trace-1.html").is_file()
