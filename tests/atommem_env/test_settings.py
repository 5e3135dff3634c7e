"""The settings that are listed are those that the environment takes."""

import inspect
from dataclasses import fields

import gymnasium as gym
import pytest

from atommem_env import ENVIRONMENTS, EpisodeSettings
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.settings import settings_command, settings_of
from atommem_env.tasks import source_options


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_setting_is_listed_with_its_meaning_and_default(name: str) -> None:
    groups = settings_of(f"AtomMem-{name}")
    listed = {setting.name for group in groups.values() for setting in group}
    given = gym.spec(f"AtomMem-{name}").kwargs
    first, *others = inspect.signature(AtomMemEnv).parameters
    options = set(source_options(given[first])) if first in given else set()
    assert listed - {first} == {field.name for field in fields(EpisodeSettings)} | options | {*others, "ablation"} - {
        "options"
    }
    for group in groups.values():
        for setting in group:
            assert setting.meaning.strip(), f"{setting.name} is not explained"
            assert "\n" not in setting.meaning


def test_defaults_are_those_of_the_environment() -> None:
    def defaults(env_id: str) -> dict[str, str]:
        return {setting.name: setting.default for group in settings_of(env_id).values() for setting in group}

    synthetic, hotpotqa = defaults("AtomMem-Synthetic"), defaults("AtomMem/HotpotQA-v0")
    env = gym.make("AtomMem-Synthetic", durability="off").unwrapped
    assert isinstance(env, AtomMemEnv)
    for field in fields(EpisodeSettings):
        assert synthetic[field.name] == repr(getattr(env.settings, field.name))
    assert (synthetic["chunk_tokens"], hotpotqa["chunk_tokens"]) == ("128", "4096")
    assert (synthetic["num_docs"], hotpotqa["num_docs"]) == ("20", "200")
    assert synthetic["embedder"] == "'hashing'"


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    settings_command("AtomMem-Files")
    shown = capsys.readouterr().out
    for text in ("how many entries a query retrieves", "question", "file, a folder, or a list of them", "embedder"):
        assert text in shown


@pytest.mark.parametrize(("env_id", "said"), [("AtomMem-Sinthetic", "did you mean"), ("CartPole-v1", "of AtomMem")])
def test_other_environments_are_rejected(env_id: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        settings_of(env_id)
