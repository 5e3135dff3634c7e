"""The flags that OpenRLHF gets of a fine-tuning run on a cluster, and the tokens."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from atommem_env.errors import DataError, JobFailed, MissingDependency, PromptTooLong, SettingError
from train.cluster.jobs import LocalJob, check_running
from train.cluster.sft import ClusterSFTConfig, launch_command, main, sft_flags, updates, write_tokens
from train.collect import CollectConfig, collect
from train.sft import read_samples

RUN = ClusterSFTConfig(
    samples=Path("/s"), model="/m", out=Path("/o"), gpus_per_node=2, batch_size=16, micro_batch_size=2
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "samples"
    collect(
        CollectConfig(env_id="AtomMem-Synthetic", episodes=4, num_docs=8, layout="terse", out=out, set=("hops=[1]",))
    )
    return out


def options(words: list[str]) -> dict[str, list[str]]:
    """Name of each option → what follows it."""
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values[word] = []
        else:
            values[list(values)[-1]].append(word)
    return values


def test_openrlhf_gets_everything_that_the_run_says() -> None:
    run = replace(RUN, zero_stage=2, learning_rate=3e-4, epochs=5, max_tokens=99, seed=7, gradient_checkpointing=False)
    flags = options(sft_flags(run, Path("/models/m")))
    expected: dict[str, list[str]] = {
        "--model.model_name_or_path": ["/models/m"],
        "--data.dataset": ["/o/tokens"],
        "--data.max_len": ["99"],
        "--train.batch_size": ["16"],
        "--train.micro_batch_size": ["2"],
        "--train.max_epochs": ["5"],
        "--train.seed": ["7"],
        "--adam.lr": ["0.0003"],
        "--ds.zero_stage": ["2"],
        "--ckpt.output_dir": ["/o/model"],
    }
    assert expected.items() <= flags.items()
    assert "--model.gradient_checkpointing_enable" not in flags
    assert "--model.gradient_checkpointing_enable" in sft_flags(RUN, Path("/models/m"))


def test_flags_of_ones_own_come_last() -> None:
    words = sft_flags(replace(RUN, openrlhf=("--ds.adam_offload", "--adam.lr=1")), Path("/m"))
    assert words[-3:] == ["--ds.adam_offload", "--adam.lr", "1"]
    assert words.index("--adam.lr") < len(words) - 2


def test_the_command_starts_a_process_for_each_gpu_of_each_machine() -> None:
    one = launch_command(RUN, Path("/m"))
    assert one[:6] == ["deepspeed", "--num_gpus", "2", "--module", "train.cluster.sft", "--model.model_name_or_path"]
    several = launch_command(replace(RUN, nodes=4, hostfile=Path("/hosts")), Path("/m"))
    assert several[1:7] == ["--hostfile", "/hosts", "--num_nodes", "4", "--num_gpus", "2"]


def test_a_dry_run_prints_the_command_and_writes_nothing(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(RUN, samples=samples, model="tiny", out=tmp_path / "a b", dry_run=True)
    main(run)
    printed = shlex.split(capsys.readouterr().out)
    assert printed == ["PYTHONSAFEPATH=1", *launch_command(run, find_model("tiny").resolve())]
    main(replace(run, model="not/here"))
    comment, command = capsys.readouterr().out.splitlines()
    assert comment.startswith("# ")
    assert "not/here" in command
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"nodes": 2}, "hostfile must be given"),
        ({"zero_stage": 1}, "zero_stage must be 2 or 3"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 6}, "multiple of micro_batch_size × all GPUs, got 6 and 2 × 2 = 4"),
    ],
)
def test_what_cannot_work_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        replace(RUN, **change)


def test_samples_that_cannot_be_trained_on_are_rejected(samples: Path, tmp_path: Path) -> None:
    run, model = replace(RUN, samples=samples, model="tiny", out=tmp_path), find_model("tiny")
    with pytest.raises(PromptTooLong, match="max_tokens is 20"):
        write_tokens(replace(run, max_tokens=20), model)
    with pytest.raises(DataError, match="atommem collect"):
        write_tokens(replace(run, samples=tmp_path), model)
    with pytest.raises(SettingError, match="less than one update of 4096"):
        write_tokens(replace(run, batch_size=4096), model)
    assert not list(tmp_path.iterdir())


def test_the_tokens_written_are_those_of_sampling(samples: Path, tmp_path: Path) -> None:
    import datasets

    model = find_model("tiny")
    run = replace(RUN, samples=samples, out=tmp_path)
    assert write_tokens(run, model) == len(list(read_samples(samples, ChatTokenizer(model), 2048)))
    for row, sample in zip(
        datasets.load_from_disk(str(tmp_path / "tokens")),
        read_samples(samples, ChatTokenizer(model), 2048),
        strict=True,
    ):
        assert row["input_ids"] == sample["input_ids"]
        assert sample["labels"] == [-100] * row["prompt_tokens"] + row["input_ids"][row["prompt_tokens"] :]


def test_updates_are_whole_batches_of_whole_micro_batches() -> None:
    assert updates(RUN, 16) == 3
    assert updates(RUN, 5) == 0
    assert updates(RUN, 6) == 0
    assert updates(RUN, 23) == 3  # 20 of the 23 in each epoch: 60 samples


@pytest.mark.skipif(importlib.util.find_spec("openrlhf") is not None, reason="OpenRLHF is installed")
def test_without_openrlhf_it_says_what_to_install(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match=r"atommem\[cluster\]"):
        main(replace(RUN, samples=samples, model="tiny", out=tmp_path / "out"))


def test_a_job_that_fails_is_one_error_with_the_cause(tmp_path: Path) -> None:
    text = '[rank1]: Traceback (most recent call last):\n[rank1]:   File "x", line 1\n[rank1]: ValueError: no\n[bye]'
    job = LocalJob([sys.executable, "-c", f"print({text!r}); raise SystemExit(3)"], {}, tmp_path / "job.log")
    job.process.wait()
    with pytest.raises(JobFailed, match=r"(?s)exit code 3: ValueError: no\n.*job\.log"):
        check_running("The job", job)
