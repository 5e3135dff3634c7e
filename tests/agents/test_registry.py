"""Policies by name and by object."""

from __future__ import annotations

import asyncio
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from playing import SPECS, make_driver

from agents import Act, Ask, load_policy, prompting, render_reply
from agents.chat_policy import ChatPolicy, Sampling
from agents.models.find import find_model
from atommem_env.errors import (
    ModelNotFound,
    PolicyError,
)
from atommem_env.plugins import load_attribute
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Reply


def test_a_policy_of_your_own_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_policy.py").write_text("def policy(observation): return 'mine'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = make_driver().settings
    policy = load_policy("my_own_policy:policy", settings)
    assert policy.name == "my_own_policy:policy", "the function's name alone would be that of other policies too"
    assert policy.begin(0, None)(make_driver().source and {}) == "mine"  # type: ignore[arg-type]
    (tmp_path / "my_broken_policy.py").write_text("import no_such_package")
    with pytest.raises(PolicyError, match=r"ModuleNotFoundError.*no_such_package.*my_broken_policy.py, line 1\)"):
        load_policy("my_broken_policy:policy", settings)
    (tmp_path / "my_own_method.py").write_text("def method(settings, ask): return lambda observation: ''")
    with pytest.raises(PolicyError, match="my_own_method:method@smollm2"):
        load_policy("my_own_method:method", settings)
    with pytest.raises(PolicyError, match="takes no model"):
        load_policy("my_own_policy:policy@tiny", settings)
    with pytest.raises(PolicyError, match="has no 'other'"):
        load_policy("my_own_policy:other", settings)


def test_a_method_of_your_own_has_any_model_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    lines = prompting.__doc__.partition("    def notes")[2] if prompting.__doc__ else ""
    imports = "from agents.prompting import render_reply\nfrom atommem_env.types import Operation, OperationKind\n"
    (tmp_path / "notes.py").write_text(imports + textwrap.dedent("    def notes" + lines))
    (tmp_path / "no_method.py").write_text("notes = 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    driver = make_driver(num_docs=10, chunk_tokens=200)
    policy = load_policy("notes:notes@tiny", driver.settings, Sampling(max_new_tokens=6))
    assert policy.name == "notes:notes@tiny"
    rollout = asyncio.run(driver.run(SPECS[:1], policy))[0]
    assert all(turn.reply.usage and turn.reply.usage.calls == 1 for turn in rollout.turns)
    assert any(turn.observation["scratchpad"] for turn in rollout.turns)
    with pytest.raises(PolicyError, match="function \\(settings, ask\\)"):
        load_policy("no_method:notes@tiny", driver.settings)


class Model:
    """Answers everything with its own name, and notes what it was asked."""

    def __init__(self, name: str = "mine") -> None:
        self.name = name
        self.asked: list[Any] = []

    async def complete(self, messages: Any, **sampling: Any) -> Reply:
        self.asked.append((messages, sampling))
        return Reply(f"<final_answer>{self.name}</final_answer>")


def notes(settings: EpisodeSettings, ask: Ask) -> Act:
    """A method, as a cell of a notebook may define it."""

    async def act(observation: Observation) -> str:
        reply = await ask([{"role": "user", "content": observation["chunk"] or "?"}])
        return render_reply(settings, Operation(OperationKind.SCRATCHPAD, reply.text))

    return act


def test_a_model_object_is_the_agent() -> None:
    driver, model = make_driver(), Model()
    policy = load_policy(model, driver.settings, Sampling(temperature=0.5, max_new_tokens=7), "terse")
    assert policy == ChatPolicy(model, driver.settings, Sampling(temperature=0.5, max_new_tokens=7), "terse")
    (rollout,) = asyncio.run(driver.run(SPECS[:1], policy))
    assert rollout.questions[0].prediction == "mine"
    assert {(asked["temperature"], asked["max_new_tokens"]) for _, asked in model.asked} == {(0.5, 7)}


@pytest.mark.parametrize(
    ("method", "name"), [("rag", "rag"), (notes, "notes"), (f"{__name__}:notes", f"{__name__}:notes")]
)
def test_a_method_has_a_model_object_behind_it(method: Any, name: str) -> None:
    driver, model = make_driver(num_docs=8), Model()
    policy = load_policy(method, driver.settings, model=model)
    assert policy.name == f"{name}@mine"
    (rollout,) = asyncio.run(driver.run(SPECS[:1], policy))
    assert sum(turn.reply.usage.calls for turn in rollout.turns if turn.reply.usage) == len(model.asked) > 0


def test_a_method_has_a_model_of_some_name_behind_it() -> None:
    pytest.importorskip("torch")
    settings = EpisodeSettings()
    assert load_policy(notes, settings, model="tiny").name == "notes@tiny"
    assert load_policy("rag", settings, model="tiny").name == load_policy("rag@tiny", settings).name == "rag@tiny"


def test_functions_and_policy_objects_are_themselves() -> None:
    settings = EpisodeSettings()
    oracle = load_policy("oracle", settings)
    assert load_policy(oracle, settings) is oracle
    assert load_policy(lambda observation: "text", settings).begin(0, None)({}) == "text"  # type: ignore[typeddict-item]


MODULE = """
from agents.registry import load_policy
from atommem_env.types import EpisodeSettings, Reply

class Model:
    name = "theirs"
    async def complete(self, messages, **sampling):
        return Reply("<final_answer>theirs</final_answer>")

class Holder:
    model = Model()

model = Model()
policy = load_policy("oracle", EpisodeSettings())
called = []
def factory():
    called.append(1)
    return model
"""


def test_an_attribute_may_be_any_of_these_objects_and_none_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = EpisodeSettings()
    calls = load_attribute("parts_of_mine:called")
    assert load_policy("parts_of_mine:model", settings).name == "theirs"
    assert load_policy("parts_of_mine:Holder.model", settings).name == "theirs"
    assert load_policy("parts_of_mine:policy", settings).name == "oracle"
    assert load_policy("rag@parts_of_mine:model", settings).name == "rag@theirs"
    assert load_policy(notes, settings, model="parts_of_mine:model").name == "notes@theirs"
    with pytest.raises(PolicyError, match=r"factory cannot be called with one"):
        load_policy("parts_of_mine:factory", settings)
    with pytest.raises(PolicyError, match="class Model: give Model"):
        load_policy("parts_of_mine:Model", settings)
    with pytest.raises(PolicyError, match="class Model: give Model"):
        load_policy("rag@parts_of_mine:Model", settings)
    with pytest.raises(PolicyError, match=r"'parts_of_mine:policyy' cannot be loaded: .* did you mean 'policy'"):
        load_policy("parts_of_mine:policyy", settings)
    with pytest.raises(ModelNotFound, match="no module 'parts_of_yours'"):
        load_policy("rag@parts_of_yours:model", settings)
    assert not calls


@pytest.mark.parametrize(
    ("policy", "model", "message"),
    [
        (notes, None, r"notes needs a model: notes@smollm2, or model=…"),
        (notes, 3, "A model is a name or an object with name and complete"),
        (notes, Model, r"must be an object, got the class Model: give Model\(…\)"),
        (notes, load_policy, "A model is a name or an object"),
        ("rag@tiny", Model(), "names its model already"),
        ("oracle", Model(), "A policy takes no model: oracle"),
        ("constant=yes", Model(), "A policy takes no model"),
        (Model(), Model(), "A policy takes no model"),
        (lambda observation: "text", "tiny", r"A method is a function \(settings, ask\) -> act"),
        (Model, None, "class Model"),
        (3, None, "function observation"),
    ],
)
def test_what_does_not_fit_together_is_rejected(policy: Any, model: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy(policy, EpisodeSettings(), model=model)


@pytest.mark.parametrize("name", ["oracel", "oraclee@tiny", "no_such_module:policy"])
def test_a_misspelt_name_is_rejected_with_what_is_near(name: str) -> None:
    message = (
        "no module 'no_such_module' in the working folder"
        if ":" in name
        else r"did you mean 'oracle'\? There are oracle"
    )
    with pytest.raises(PolicyError, match=message):
        load_policy(name, EpisodeSettings())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("rag", PolicyError, "rag needs a model: rag@smollm2"),
        ("rag@", PolicyError, "rag needs a model"),
        ("oracle@tiny", PolicyError, "oracle takes no model"),
        ("raf@tiny", PolicyError, "No policy is called 'raf@tiny'.*memagent"),
        ("rag@nothing-of-that-name", ModelNotFound, "nothing-of-that-name"),
        ("folder/of/no-model", ModelNotFound, "folder/of/no-model"),
    ],
)
def test_a_name_that_is_none_is_rejected_with_what_there_is(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_policy(name, EpisodeSettings())


def test_an_at_sign_parts_a_method_from_its_model_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "me@home"
    shutil.copytree(find_model("tiny"), folder)
    settings = EpisodeSettings()
    assert load_policy(str(folder), settings).name == "me@home"
    assert load_policy(f"rag@{folder}", settings).name == "rag@me@home"
    assert load_policy("perfect-rag", settings).privileged
    assert not load_policy(f"append-all@{folder}", settings).privileged
    assert load_policy("constant=a@b", settings).name == "constant=a@b"
