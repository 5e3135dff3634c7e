"""`atommem sft`: supervised fine-tuning of a chat model on collected samples, by TRL.

    atommem models get smollm2
    atommem collect AtomMem-Synthetic --policy oracle --episodes 100 --layout terse --out runs/samples
    atommem sft runs/samples --model smollm2 --out runs/sft
    atommem eval --policy runs/sft/model --out runs/sft-eval

The loss is on the replies alone. Prompts become ids by the function that also serves in sampling, so that training and
evaluation see the same tokens. The folder `--out` then holds the model in the form of Hugging Face (`model/`, with
`atommem.json`, which says how it is played: as the samples were collected), `config.json` and `metrics.jsonl`. What is left out:
more than one process, and resuming an interrupted run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from atommem_env.errors import DataError, MissingDependency, PromptTooLong, SettingError
from eval.played_as import eval_command, read_record, write_card
from eval.progress import step_progress
from eval.run_folder import require_empty_dir, to_jsonl, write_atomic
from train.estimate import check_memory
from train.settings import SFTConfig

_IGNORED = -100  # PyTorch's label of a token without loss


def read_samples(folder: Path, chat: ChatTokenizer, max_tokens: int) -> Iterator[dict[str, list[int]]]:
    """The samples as token ids [T] and labels [T], where prompt tokens have the label -100.

    Raises:
        DataError: the folder holds no samples.
        PromptTooLong: a sample has more than `max_tokens` tokens.
    """
    path = folder / "samples.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist. Name a folder that `atommem collect --out` wrote.")
    for row in pq.read_table(path, columns=["prompt", "completion", "episode", "turn"]).to_pylist():
        prompt = chat.prompt_ids(row["prompt"])
        completion = chat.completion_ids(row["completion"][0]["content"])
        if len(prompt) + len(completion) > max_tokens:
            raise PromptTooLong(
                f"Turn {row['turn']} of episode {row['episode']} has {len(prompt)} + {len(completion)} tokens, and max_tokens is "
                f"{max_tokens}. Collect with smaller chunk_tokens and memory_tokens, or raise --max-tokens."
            )
        yield {"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion}


def write_samples_card(samples: Path, out: Path, *, command: str, recipe: str | None = None) -> None:
    """Writes `atommem.json` into the folder `model/` of a run on these samples: it is played as they were collected.

    Nothing is written where the samples do not say how that was: where `atommem collect` did not write them.
    """
    collected = read_record(samples / "config.json")
    if collected:
        write_card(out / "model", collected.values, collected.max_new_tokens, command=command, run=out, recipe=recipe)


def train(run: SFTConfig) -> dict[str, Any]:
    """Trains, writes the model, and returns the numbers of the last line of `metrics.jsonl`.

    Raises:
        SettingError: the folder is not empty, or the batch cannot be split.
        MissingDependency: the extra `train` is not installed.
    """
    require_empty_dir(run.out)
    if run.micro_batch_size < 1 or run.batch_size % run.micro_batch_size:
        raise SettingError(
            f"batch_size must be a multiple of micro_batch_size, got {run.batch_size} and {run.micro_batch_size}."
        )
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
    check_memory(run)
    disable_progress_bar()  # of loading and saving: ours shows more
    folder = find_model(run.model)
    chat = ChatTokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, run.dtype), local_files_only=True)
    window = model.config.get_text_config().max_position_embeddings
    samples = list(read_samples(run.samples, chat, min(run.max_tokens, window)))
    arguments = TRLConfig(
        output_dir=str(run.out / "trainer"),
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
        save_strategy="no",
        report_to="none",
        seed=run.seed,
    )
    lora = LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(samples),
        processing_class=chat.backend,
        peft_config=lora if run.lora_rank else None,
    )
    trainer.remove_callback(ProgressCallback)  # it prints a dictionary for each update
    with step_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("SFT", total=None, status="")

        class Bar(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                status = f"loss {logs['loss']:.3f}" if "loss" in logs else ""
                progress.update(bar, total=state.max_steps, completed=state.global_step, status=status)

        trainer.add_callback(Bar())
        trainer.train()
    trained = trainer.model.merge_and_unload() if run.lora_rank else trainer.model
    trained.to(getattr(torch, run.dtype)).save_pretrained(run.out / "model")
    chat.backend.save_pretrained(run.out / "model")
    write_samples_card(run.samples, run.out, command="atommem sft", recipe=run.recipe)
    write_atomic(run.out / "config.json", json.dumps(dataclasses.asdict(run), indent=2, default=str) + "\n")
    write_atomic(run.out / "metrics.jsonl", "".join(map(to_jsonl, trainer.state.log_history)))
    return dict(trainer.state.log_history[-1])


def main(run: SFTConfig) -> None:
    """Fine-tune a chat model on collected samples; the loss is on the replies alone."""
    metrics = train(run)
    Console().print(
        f"Mean loss {metrics['train_loss']:.3f} over {metrics['step']} updates, {metrics['train_runtime']:.0f} s.\n"
        f"The model is in [bold]{run.out / 'model'}[/]. Evaluate it:\n  {eval_command(run.out / 'model')}",
        soft_wrap=True,
    )
