"""`atommem sft`: supervised fine-tuning of a chat model on collected samples, by TRL.

    atommem models get smollm2
    atommem collect AtomMem-Synthetic --policy oracle --episodes 100 --layout terse --out runs/samples
    atommem sft runs/samples --model smollm2 --out runs/sft
    atommem eval --policy runs/sft/model --out runs/sft-eval

The loss is on the replies alone. Prompts become ids by the function that also serves in sampling, so that training and
evaluation see the same tokens. The folder `--out` then holds the model in the form of Hugging Face (`model/`, with
`atommem.json`, which says how it is played: as the samples were collected), `config.json` and `metrics.jsonl`; while it trains
also `trainer/`, with the last checkpoint, from which `--resume` continues as if the run had never been stopped. What is left
out: more than one process.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from atommem_env.errors import CheckpointError, DataError, MissingDependency, PromptTooLong
from atommem_env.tasks.catalogue import sha256_of
from eval.played_as import eval_command, read_record, write_card
from eval.progress import step_progress
from eval.provenance import add_session
from eval.run_folder import read_jsonl, to_jsonl, write_atomic
from train.estimate import check_memory
from train.settings import SFTConfig, open_run

_IGNORED = -100  # PyTorch's label of a token without loss


def read_samples(folder: Path, chat: ChatTokenizer, max_tokens: int) -> Iterator[dict[str, list[int]]]:
    """The samples as token ids [T] and labels [T], where prompt tokens have the label -100.

    Raises:
        DataError: the folder holds no samples.
        PromptTooLong: a sample has more than `max_tokens` tokens.
    """
    path = _samples_file(folder)
    for row in pq.read_table(path, columns=["prompt", "completion", "episode", "turn"]).to_pylist():
        prompt = chat.prompt_ids(row["prompt"])
        completion = chat.completion_ids(row["completion"][0]["content"])
        if len(prompt) + len(completion) > max_tokens:
            raise PromptTooLong(
                f"Turn {row['turn']} of episode {row['episode']} has {len(prompt)} + {len(completion)} tokens, and max_tokens is "
                f"{max_tokens}. Collect with smaller chunk_tokens and memory_tokens, or raise --max-tokens."
            )
        yield {"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion}


def _samples_file(folder: Path) -> Path:
    path = folder / "samples.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist. Name a folder of `atommem collect --out`, whose run is finished.")
    return path


def write_samples_card(samples: Path, model: Path, *, command: str, run: Path, recipe: str | None = None) -> None:
    """Writes `atommem.json` into the folder of a model that was trained on these samples: it is played as they were collected.

    Nothing is written where the samples do not say how that was: where `atommem collect` did not write them.
    """
    collected = read_record(samples / "config.json")
    if collected:
        write_card(model, collected.values, collected.max_new_tokens, command=command, run=run, recipe=recipe)


def train(run: SFTConfig) -> dict[str, Any]:
    """Trains, writes the model, and returns the numbers of the last line of `metrics.jsonl`.

    Raises:
        SettingError: the folder is not empty, or holds another run than that to resume.
        CheckpointError: the checkpoint to resume from cannot be read without unpickling, which is not done.
        MissingDependency: the extra `train` is not installed.
    """
    check_memory(run)
    resolved_config = open_run(run, samples_sha256=sha256_of(_samples_file(run.samples)))
    metrics = run.out / "metrics.jsonl"
    if metrics.is_file():  # written last: nothing is left to do
        return read_jsonl(metrics)[-1]
    try:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, ProgressCallback, TrainerCallback
        from transformers.utils.logging import disable_progress_bar
        from trl import SFTConfig as TRLConfig
        from trl import SFTTrainer
    except ImportError as error:
        raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error
    from train.checkpoints import check_disk

    disable_progress_bar()  # of loading and saving: ours shows more
    folder = find_model(run.model)
    chat = ChatTokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, run.dtype), local_files_only=True)
    window = model.config.get_text_config().max_position_embeddings
    samples = list(read_samples(run.samples, chat, min(run.max_tokens, window)))
    checkpoints = run.out / "trainer"
    arguments = TRLConfig(
        output_dir=str(checkpoints),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=run.batch_size // run.micro_batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1: a share of the updates
        bf16=torch.cuda.is_available(),
        activation_checkpointing=torch.cuda.is_available(),  # trades time for memory, of which a CPU has enough
        dataloader_pin_memory=torch.cuda.is_available(),
        max_length=None,
        logging_steps=1,
        save_strategy="steps",
        save_steps=run.save_every,
        report_to="none",
        seed=run.seed,
    )
    lora = LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(run.seed)  # of the adapters, which are made before TRL seeds anything
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(samples),
        processing_class=chat.backend,
        peft_config=lora if run.lora_rank else None,
    )
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    check_disk(run.out, 3 * sum(weight.numel() * weight.element_size() for weight in trained))  # and two moments
    write_atomic(run.out / "config.json", resolved_config)
    add_session(run.out)
    trainer.remove_callback(ProgressCallback)  # it prints a dictionary for each update
    with step_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("SFT", total=None, status="")

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.log_history:  # TRL counts tokens from 0 when it resumes
                    trainer._total_train_tokens = state.log_history[-1]["num_tokens"]

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                status = f"loss {logs['loss']:.3f}" if "loss" in logs else ""
                progress.update(bar, total=state.max_steps, completed=state.global_step, status=status)

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                for path in checkpoints.glob("checkpoint-*"):
                    if path.name != f"checkpoint-{state.global_step}":  # this one is complete now
                        shutil.rmtree(path)

        trainer.add_callback(Callback())
        checkpoint = _last_checkpoint(checkpoints)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except pickle.UnpicklingError as error:  # transformers reads what it resumes from with weights_only=True
            raise CheckpointError(
                f"{checkpoint} holds pickled objects that could run code, so it was not read. Start a new run with another --out."
            ) from error
    _write_model(run, trainer, chat)
    *updates, last = trainer.state.log_history
    losses = [line["loss"] for line in updates if "loss" in line]
    last["train_loss"] = fmean(losses)  # transformers leaves out the updates before a resume
    lines = (dict(sorted(line.items())) for line in [*updates, last])  # as transformers orders them when it resumes
    write_atomic(metrics, "".join(map(to_jsonl, lines)))
    shutil.rmtree(checkpoints)
    return dict(last)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint that transformers wrote to a folder; one that a kill left incomplete is removed."""
    complete: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # which it writes last
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            complete[state["global_step"]] = path
    return complete[max(complete)] if complete else None


def _write_model(run: SFTConfig, trainer: Any, chat: ChatTokenizer) -> None:
    """Writes `model/` at once: a run that is killed meanwhile leaves none."""
    import torch

    trained = trainer.model.merge_and_unload() if run.lora_rank else trainer.model
    partial = run.out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trained.to(getattr(torch, run.dtype)).save_pretrained(partial)
    chat.backend.save_pretrained(partial)
    write_samples_card(run.samples, partial, command="atommem sft", run=run.out, recipe=run.recipe)
    shutil.rmtree(run.out / "model", ignore_errors=True)
    partial.rename(run.out / "model")


def main(run: SFTConfig) -> None:
    """Fine-tune a chat model on collected samples; the loss is on the replies alone."""
    metrics = train(run)
    Console().print(
        f"Mean loss {metrics['train_loss']:.3f} over {metrics['step']} updates, {metrics['train_runtime']:.0f} s.\n"
        f"The model is in [bold]{run.out / 'model'}[/]. Evaluate it:\n  {eval_command(run.out / 'model')}",
        soft_wrap=True,
    )
