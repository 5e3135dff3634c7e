"""Model back ends by name."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from agents.models.find import TINY
from agents.models.load import MODELS, is_model, load_model
from agents.models.openai_api import OpenAIModel
from agents.models.vllm_model import VLLMModel
from atommem_env.errors import MissingDependency, ModelNotFound, SettingError


def test_a_model_is_one_object_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    for name in ("tiny", "openai:org/m"):
        assert load_model(name) is load_model(name)
        assert load_model(name).name == name
    assert isinstance(load_model("openai:org/m"), OpenAIModel)
    load_model.cache_clear()


def test_a_folder_is_called_by_its_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    shutil.copytree(TINY, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert is_model(".")
    assert load_model(".").name == load_model(str(tmp_path / "mine")).name == "mine"
    load_model.cache_clear()


@pytest.mark.parametrize("name", ["no-such-model", "openai:", "vllm:", "other:model"])
def test_an_unknown_name_is_answered_with_what_there_is(name: str) -> None:
    with pytest.raises(ModelNotFound, match=", ".join(MODELS)):
        load_model(name)


def test_what_is_missing_is_reported_by_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SettingError, match="OPENAI_BASE_URL"):
        load_model("openai:m")
    with pytest.raises(ModelNotFound, match="atommem models get smollm2"):
        load_model("smollm2")


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependency, match=r"'vllm:tiny' needs 'vllm'.*pip install vllm .*openai:NAME"):
        VLLMModel("tiny")
