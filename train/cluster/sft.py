"""Supervised fine-tuning on a cluster, by OpenRLHF and DeepSpeed, from the same files as `atommem sft`.

    atommem collect AtomMem-HotpotQA --policy my_module:teacher --episodes 2000 --out runs/samples
    atommem train cluster-sft runs/samples --model /models/Qwen3-8B --out runs/sft
    atommem train cluster-sft runs/samples --model /models/Qwen3-8B --out runs/sft --dry-run       # prints the command

The job is `openrlhf.cli.train_sft`, with samples of ours instead of its own: token ids, those of sampling. Left to itself
OpenRLHF renders and tokenizes chats by rules of its own: a template may write a reply otherwise than it is sampled, and what a
document says can become a control token. The loss is on the replies alone, the mean over the tokens of a batch. Weights are
bfloat16, with a float32 copy in the optimizer; learning rate and Adam are those of `atommem sft`.

The folder `--out`, which all machines must see under the same path, then holds the model in the form of Hugging Face
(`model/`), `config.json`, `metrics.jsonl`, `job.log` and the token ids (`tokens/`). DeepSpeed runs in it, and so reads a
`.deepspeed_env` of the home folder alone.

What is left out: resuming an interrupted run; and the samples that do not fill the last micro-batch of all GPUs in an epoch,
or the last batch of the run. They are others in each epoch, as samples are shuffled again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import runpy
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import tyro
from rich.console import Console

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from atommem_env.errors import MissingDependency, ModelNotFound, SettingError
from eval.played_as import eval_command
from eval.progress import step_progress
from eval.provenance import add_session
from eval.run_folder import read_jsonl, require_empty_dir, to_jsonl, write_atomic
from train.cluster.jobs import LocalJob, check_running, ended_by_signals
from train.cluster.recipe import VERSION, flag_words
from train.sft import read_samples, write_samples_card

_METRICS = "metrics.jsonl"
_POLL = 2.0  # seconds between looks at the job
# -P for each of the processes that DeepSpeed's launcher starts by `python -m`, on all machines: else a `train.py` of the working
# folder would be imported instead of ours.
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSFTConfig:
    """What is to be learned from what, on how many GPUs."""

    samples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SAMPLES")]
    """Folder that `atommem collect` wrote."""
    model: str = "smollm2"
    """The model to start from: smollm2, or the folder of a Hugging Face chat model."""
    out: Path = Path("runs/sft")
    """Folder of the run; new or empty."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each machine that this run takes."""
    hostfile: Path | None = None
    """The machines of a run on several, a line "HOST slots=GPUS" for each: DeepSpeed reaches them by ssh, without a password."""
    zero_stage: int = 3
    """DeepSpeed: 2 shards gradients and moments over the GPUs, 3 the weights as well."""
    gradient_checkpointing: bool = True
    """Compute activations twice instead of storing them: less memory, more time."""
    epochs: int = 3
    """Passes over the samples."""
    batch_size: int = 16
    """Samples in an update, over all GPUs."""
    micro_batch_size: int = 1
    """Samples that a GPU computes at the same time; changes memory and speed only."""
    learning_rate: float = 2e-5
    """Highest learning rate; it rises over the first 3 % of the updates and falls to 0 as a cosine."""
    max_tokens: int = 18_384
    """A longer sample, prompt and reply together, is rejected: nothing is truncated."""
    seed: int = 0
    """Of the order of the samples."""
    openrlhf: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FLAG")] = ()
    """Any other flags of OpenRLHF, for example --ds.adam_offload or --ds.zpg=8; they come last, and so count."""
    dry_run: bool = False
    """Print the command; nothing is started, nothing is written."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "epochs", "batch_size", "micro_batch_size", "max_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("zero_stage", self.zero_stage in (2, 3), "2 or 3")
        self._check("learning_rate", self.learning_rate > 0, "above 0")
        self._check("hostfile", self.nodes == 1 or self.hostfile is not None, "given where there are several nodes")
        if self.batch_size % self.samples_at_once:
            raise SettingError(
                f"batch_size must be a multiple of micro_batch_size × all GPUs, got {self.batch_size} and "
                f"{self.micro_batch_size} × {self.nodes * self.gpus_per_node} = {self.samples_at_once}."
            )

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def samples_at_once(self) -> int:
        """Samples that all GPUs together compute at the same time."""
        return self.micro_batch_size * self.nodes * self.gpus_per_node


def updates(run: ClusterSFTConfig, samples: int) -> int:
    """How many updates so many samples give; an incomplete one is not made.

    Of 70 samples, 16 at once, an epoch trains 64. Three epochs are 192, six batches of 32 samples:

    >>> updates(ClusterSFTConfig(samples=Path("s"), epochs=3, batch_size=32, micro_batch_size=2), 70)
    6
    """
    return samples // run.samples_at_once * run.samples_at_once * run.epochs // run.batch_size


def sft_flags(run: ClusterSFTConfig, model: Path) -> list[str]:
    """The arguments of `openrlhf.cli.train_sft`.

    Args:
        model: the folder of the model to start from.
    """
    flags: dict[str, Any] = {
        "model.model_name_or_path": model,
        "model.gradient_checkpointing_enable": run.gradient_checkpointing,
        "data.dataset": run.out / "tokens",
        "data.max_len": run.max_tokens,
        "data.max_samples": 2**31 - 1,  # its own limit is a million
        "train.batch_size": run.batch_size,
        "train.micro_batch_size": run.micro_batch_size,
        "train.max_epochs": run.epochs,
        "train.seed": run.seed,
        "adam.lr": run.learning_rate,
        "adam.betas": (0.9, 0.999),
        "lr_scheduler": "cosine",
        "lr_warmup_ratio": 0.03,
        "max_norm": 1.0,
        "ds.zero_stage": run.zero_stage,
        "ds.packing_samples": True,  # a micro-batch is computed without padding
        "ckpt.path": run.out / "checkpoints",
        "ckpt.output_dir": run.out / "model",
        "logger.tensorboard_dir": run.out / "tensorboard",
        "logger.wandb.run_name": run.out.name,
    }
    return flag_words(flags, run.openrlhf)


def launch_command(run: ClusterSFTConfig, model: Path) -> list[str]:
    """The command that starts the job on all GPUs, from one of the machines.

    Args:
        model: the folder of the model to start from.
    """
    where = ["--num_gpus", str(run.gpus_per_node)]
    if run.nodes > 1:
        where = ["--hostfile", str(run.hostfile), "--num_nodes", str(run.nodes), *where]
    return ["deepspeed", *where, "--module", "train.cluster.sft", *sft_flags(run, model)]


def main(run: ClusterSFTConfig) -> None:
    """Fine-tune a chat model on collected samples, on the GPUs of one machine or several; the loss is on the replies alone."""
    paths = {
        name: path.resolve() for name in ("samples", "out", "hostfile") if (path := getattr(run, name)) is not None
    }
    run = dataclasses.replace(run, **paths)  # the job on another machine does not run in this folder
    out = Console()
    if run.dry_run:
        try:
            model = find_model(run.model).resolve()
        except (ModelNotFound, MissingDependency) as error:
            out.print(f"# {error}", soft_wrap=True, markup=False, highlight=False)
            model = Path(run.model)
        variables = [f"{name}={value}" for name, value in _SAFE_PATH.items()]
        words = shlex.join([*variables, *launch_command(run, model)])
        out.print(words, soft_wrap=True, markup=False, highlight=False)
        return
    metrics = train(run, Console(stderr=True))
    out.print(
        f"Loss {metrics['loss']:.3f} in the last of {metrics['step']} updates.\n"
        f"The model is in [bold]{run.out / 'model'}[/]. Evaluate it:\n  {eval_command(run.out / 'model')}",
        soft_wrap=True,
    )


def train(run: ClusterSFTConfig, console: Console) -> dict[str, Any]:
    """Trains, writes the model, and returns the last line of `metrics.jsonl`.

    Args:
        console: where progress is shown.

    Raises:
        SettingError: the folder is not empty, there are fewer samples than one update needs, or another version of OpenRLHF.
        DataError: the folder holds no samples.
        PromptTooLong: a sample has more than `max_tokens` tokens, or more than the model reads.
        MissingDependency: the extra `cluster` is not installed.
        JobFailed: the job ended before it was done.
    """
    require_empty_dir(run.out)
    _check_version()
    model = find_model(run.model).resolve()
    run.out.mkdir(parents=True, exist_ok=True)
    total = updates(run, write_tokens(run, model))
    write_atomic(run.out / "config.json", json.dumps(dataclasses.asdict(run), indent=2, default=str) + "\n")
    add_session(run.out)
    words = [sys.executable, "-m", "deepspeed.launcher.runner", *launch_command(run, model)[1:]]
    with ExitStack() as stack, ended_by_signals(), step_progress(console) as progress:
        # In the run's folder: for several machines DeepSpeed puts the working folder into PYTHONPATH.
        job = LocalJob(words, _SAFE_PATH, run.out / "job.log", folder=run.out)
        stack.callback(job.stop)
        bar = progress.add_task("SFT", total=total, status="starting")
        running = True
        while running:
            running = check_running("The job", job)
            for line in read_jsonl(run.out / _METRICS)[-1:]:
                progress.update(bar, completed=line["step"], status=f"loss {line['loss']:.3f}")
            if running:
                time.sleep(_POLL)
    write_samples_card(run.samples, run.out / "model", command="atommem train cluster-sft", run=run.out)
    return read_jsonl(run.out / _METRICS)[-1]


def write_tokens(run: ClusterSFTConfig, model: Path) -> int:
    """Writes the samples as token ids to the run's `tokens/`; returns how many there are.

    Columns: `input_ids` [T], a prompt and its reply; `prompt_tokens`, how many of them are the prompt.

    Raises:
        SettingError, DataError, PromptTooLong: as in `train`.
    """
    import datasets
    from transformers import AutoConfig

    window = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config().max_position_embeddings
    ids, prompt_tokens = [], []
    for sample in read_samples(run.samples, ChatTokenizer(model), min(run.max_tokens, window)):
        ids.append(pa.array(sample["input_ids"], pa.int32()))
        prompt_tokens.append(sample["labels"].count(-100))
    if not updates(run, len(ids)):
        raise SettingError(
            f"{run.samples} holds {len(ids)} samples, computed {run.samples_at_once} at once: {run.epochs} epochs of that are "
            f"less than one update of {run.batch_size}. Collect more --episodes, or lower --batch-size."
        )
    rows = {"input_ids": pa.array(ids, pa.list_(pa.int32())), "prompt_tokens": pa.array(prompt_tokens, pa.int32())}
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table(rows)).save_to_disk(run.out / "tokens")
    return len(ids)


# ------------------------------------------------------------------------------------------------------- inside of the job


def job() -> None:
    """Runs `openrlhf.cli.train_sft` with the arguments of this process, one for each GPU."""
    _check_version()
    install()
    runpy.run_module("openrlhf.cli.train_sft", run_name="__main__", alter_sys=True)


def install() -> None:
    """Puts our samples and our log where OpenRLHF finds its own."""
    import openrlhf.datasets
    import openrlhf.trainer.sft_trainer
    import torch

    class TokenDataset(openrlhf.datasets.SFTDataset):
        """Items: token ids, attention mask and loss mask, each [1, T]; the last marks the positions *before* a reply's tokens."""

        def __init__(self, dataset: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
            self.rows, self.tokenizer = dataset, tokenizer

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            row = self.rows[index]
            ids = torch.tensor([row["input_ids"]])
            loss_mask = torch.zeros_like(ids, dtype=torch.float32)
            loss_mask[0, row["prompt_tokens"] - 1 : -1] = 1
            return ids, torch.ones_like(ids), loss_mask

    class LoggedTrainer(openrlhf.trainer.sft_trainer.SFTTrainer):
        """Also writes `metrics.jsonl`."""

        def save_logs_and_checkpoints(
            self, args: Any, global_step: int, step_bar: Any, logs_dict: Any, client_states: Any
        ) -> None:
            super().save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states)
            # OpenRLHF's is of this process alone, and scaled so that the mean over processes is the one over tokens.
            loss = self.strategy.all_reduce(logs_dict["loss_mean"])
            if self.strategy.is_rank_0():
                line = {"step": global_step, "loss": loss}
                line |= {"learning_rate": logs_dict["lr"], "grad_norm": logs_dict["grad_norm"]}
                with (Path(args.ckpt.output_dir).parent / _METRICS).open("a", encoding="utf-8") as file:
                    file.write(to_jsonl(line))

    openrlhf.datasets.SFTDataset = TokenDataset
    openrlhf.trainer.sft_trainer.SFTTrainer = LoggedTrainer


def _check_version() -> None:
    try:
        installed = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency("Training on a cluster needs OpenRLHF: pip install 'atommem[cluster]'.") from error
    if installed != VERSION:
        raise SettingError(
            f"This is written for OpenRLHF {VERSION}; {installed} is installed. pip install openrlhf=={VERSION}"
        )


if __name__ == "__main__":
    job()
