"""Supervised fine-tuning through OpenRLHF: its flags, the tokens that it gets, and a whole run."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import shadow_packages
from rich.console import Console

from agents.models.chat_tokenizer import ChatTokenizer
from eval.run_folder import read_jsonl
from train.cluster.sft import ClusterSFTConfig, sft_flags, train, write_tokens
from train.collect import CollectConfig, collect
from train.sft import read_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "samples"
    collect(
        CollectConfig(env_id="AtomMem-Synthetic", episodes=12, num_docs=8, layout="terse", out=out, set=("hops=[1]",))
    )
    return out


@pytest.fixture
def run(samples: Path, tmp_path: Path) -> ClusterSFTConfig:
    return ClusterSFTConfig(samples=samples, model="tiny", out=tmp_path / "sft", gpus_per_node=2, batch_size=8)


def test_openrlhf_knows_every_flag(run: ClusterSFTConfig) -> None:
    root = importlib.util.find_spec("openrlhf")
    assert root is not None
    assert root.origin is not None
    source = (Path(root.origin).parent / "cli" / "train_sft.py").read_text()
    known = set(re.findall(r'add_argument\(\s*"(--[\w.]+)"', source))
    assert {word for word in sft_flags(run, Path("/m")) if word.startswith("--")} <= known


_ITEMS = """
import json, sys
from types import SimpleNamespace
import datasets
from train.cluster.sft import install
install()
from openrlhf.datasets import SFTDataset
rows = SFTDataset(datasets.load_from_disk(sys.argv[1]), SimpleNamespace(pad_token_id=0), 4096, None, input_template=None)
print(json.dumps([[part.tolist() for part in rows[index]] for index in range(len(rows))]))
batch = rows.collate_fn([rows[0], rows[1]])
print(json.dumps([list(part.shape) for part in batch]))
"""


def test_openrlhf_gets_these_tokens_and_the_loss_is_on_the_replies_alone(run: ClusterSFTConfig, tiny: Path) -> None:
    write_tokens(run, tiny)
    done = subprocess.run(
        [sys.executable, "-c", _ITEMS, str(run.out / "tokens")], capture_output=True, text=True, check=True
    )
    items, shapes = map(json.loads, done.stdout.splitlines()[-2:])
    expected = list(read_samples(run.samples, ChatTokenizer(tiny), 2048))
    assert len(items) == len(expected)
    for ((ids,), (attention,), (loss_mask,)), sample in zip(items, expected, strict=True):
        assert ids == sample["input_ids"]
        assert attention == [1] * len(ids)
        # A position counts where the token after it is one of the reply's; the last has none after it.
        assert loss_mask == [float(label != -100) for label in sample["labels"][1:]] + [0.0]
    longest = max(len(sample["input_ids"]) for sample in expected[:2])
    assert shapes == [[2, longest]] * 3


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_run_learns_and_its_model_is_loaded(
    zero_stage: int, run: ClusterSFTConfig, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    shadow_packages(tmp_path / "working")
    monkeypatch.chdir(tmp_path / "working")
    run = replace(run, zero_stage=zero_stage, learning_rate=1e-3, epochs=4)
    last = train(run, Console(quiet=True))
    lines = read_jsonl(run.out / "metrics.jsonl")
    assert last == lines[-1]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, run.out / "model"))
    assert any((new != old).any() for new, old in zip(after.parameters(), before.parameters(), strict=True))
