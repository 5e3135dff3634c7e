"""A whole step of GRPO: how much of it is the model, and how fast it is beside TRL's.

    python -m train.benchmarks.steps
    python -m train.benchmarks.steps --model FOLDER --out steps.json

**shares**: where the time of `train.grpo.Trainer.train_step` goes. A part has the time that was spent in its functions, but
for what they spent in other parts; what no part has is "other" (event loop, driver, metrics of the step). Everything but
forward, backward, optimiser, the arithmetic on logits and the copies of cached keys and values is *outside the model*.

**trl**: the same model, prompts and numbers of tokens through `trl.GRPOTrainer` and through ours, one after the other, step by
step, in one process. One turn, for TRL knows no environment with a memory; replies of a fixed length, for the end of a reply is
made a token that the model does not have. Both read and decode the same chats, make one update a generation on all tokens in
one micro-batch, with the same loss and optimiser, in float32. TRL generates by `transformers` (no vLLM); its gradient
checkpointing, on by default, is off.

Without `--model` it is the model of `train.tiny_base`, untrained: it writes rubbish, nearly always up to the limit of tokens,
and earns nothing, so that no group would be trained on. Rewards are therefore given, 0 and 1 in turn, to any model: every
sample is trained on. Times depend on the machine, shares and ratios less. Where others use it too, read those of the
processor's time; they are right for one thread only (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import train.grpo
import train.losses
import train.packing
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.decoding import Batch, RowCache
from agents.rollout import Driver
from atommem_env.episode import Episode
from atommem_env.tasks.synthetic_world import vocabulary
from atommem_env.types import Message, Observation, Rollout, StopReason, Turn
from eval.benchmarks import write_figures
from train.advantages import group_advantages
from train.grpo import Trainer
from train.samples import make_samples
from train.settings import LocalGRPOConfig
from train.tiny_base import build_model, build_tokenizer

Function = TypeVar("Function", bound=Callable[..., Any])
Seconds = tuple[float, float]  # on the wall, of the processor

MODEL_PARTS = (
    "sampling: forward",
    "sampling: softmax, draw",
    "sampling: keys and values",
    "update: forward",
    "update: loss",
    "update: backward",
    "update: optimiser",
)
OTHER = "other"
_TASK = ("hops=[1,2]", "chunk_tokens=48", "capacity=4", "top_k=3", "scratchpad=false")


class Clock:
    """Where the time of one thread goes: at any moment it belongs to one part, the innermost that is running.

    >>> clock = Clock()
    >>> with clock.part("outer"):
    ...     time.sleep(0.01)
    ...     with clock.part("inner"):
    ...         time.sleep(0.01)
    >>> spent = clock.take()
    >>> sorted(spent), spent["outer"][0] >= 0.01 <= spent["inner"][0]
    (['inner', 'other', 'outer'], True)
    """

    def __init__(self) -> None:
        self._running = [OTHER]
        self._last = _now()
        self._spent: dict[str, Seconds] = defaultdict(lambda: (0.0, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this part."""
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def timed(self, function: Function, name: str | Callable[[], str]) -> Function:
        """The function as a part; `name` may depend on the moment of the call."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    def take(self) -> dict[str, Seconds]:
        """The seconds of each part since the last call."""
        self._book()
        spent = dict(self._spent)
        self._spent.clear()
        return spent

    def _book(self) -> None:
        now, (wall, cpu) = _now(), self._spent[self._running[-1]]
        self._spent[self._running[-1]] = wall + now[0] - self._last[0], cpu + now[1] - self._last[1]
        self._last = now


def _now() -> Seconds:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class RewardedTrainer(Trainer):
    """Gives the rollouts of each group the rewards 0, 1, 0, 1, …, so that every group is trained on."""

    def play_groups(self) -> list[list[Rollout | None]]:
        return [
            [rollout and replace(rollout, reward=float(index % 2)) for index, rollout in enumerate(group)]
            for group in super().play_groups()
        ]


# ------------------------------------------------------------------------------------------------------ shares of a step


@dataclass(frozen=True, slots=True)
class Shares:
    """Where the time of a step goes. `wall` and `cpu` are shares that add up to 1, over all steps that were measured."""

    model: str
    rollouts: int  # a step
    turns: float  # of a rollout
    prompt_tokens: float  # of a turn
    reply_tokens: float  # of a turn
    seconds: float  # a step, the median
    wall: dict[str, float]
    cpu: dict[str, float]  # right for one thread only
    outside_wall: float  # all parts that are not of the model
    outside_cpu: float
    outside_by_step: tuple[Seconds, ...]  # shares
    threads: int


def measure_shares(
    folder: Path, *, steps: int, groups: int = 8, group_size: int = 16, num_docs: int = 8, max_new_tokens: int = 48
) -> Shares:
    """Makes a step to warm up, then measures `steps` of them."""
    with tempfile.TemporaryDirectory() as out:
        trainer = RewardedTrainer(
            LocalGRPOConfig(
                env_id="AtomMem-Synthetic",
                num_docs=num_docs,
                set=_TASK,
                layout="terse",
                max_new_tokens=max_new_tokens,
                in_flight=groups * group_size,
                model=str(folder),
                out=Path(out) / "run",
                steps=steps + 1,
                groups=groups,
                group_size=group_size,
                eval_every=0,
            )
        )
        trainer.train_step()
        clock = Clock()
        lines, spent = [], []
        with _watching(trainer, clock):
            for _ in range(steps):
                clock.take()
                lines.append(trainer.train_step())
                spent.append(clock.take())
        trainer.tensorboard.close()
    parts = [*MODEL_PARTS, *sorted({part for step in spent for part in step} - {*MODEL_PARTS, OTHER}), OTHER]
    wall, cpu = ({part: sum(step.get(part, (0.0, 0.0))[axis] for step in spent) for part in parts} for axis in (0, 1))
    wall, cpu = ({part: one / sum(all_.values()) for part, one in all_.items()} for all_ in (wall, cpu))
    return Shares(
        model=folder.name,
        rollouts=groups * group_size,
        turns=statistics.fmean(line["turns"] for line in lines),
        prompt_tokens=statistics.fmean(line["prompt_tokens"] for line in lines),
        reply_tokens=statistics.fmean(line["reply_tokens"] for line in lines),
        seconds=statistics.median(sum(wall for wall, _ in step.values()) for step in spent),
        wall=wall,
        cpu=cpu,
        outside_wall=1 - sum(wall[part] for part in MODEL_PARTS),
        outside_cpu=1 - sum(cpu[part] for part in MODEL_PARTS),
        outside_by_step=tuple((_outside(step, 0), _outside(step, 1)) for step in spent),
        threads=torch.get_num_threads(),
    )


def _outside(spent: dict[str, Seconds], axis: Literal[0, 1]) -> float:
    model = sum(seconds[axis] for part, seconds in spent.items() if part in MODEL_PARTS)
    return 1 - model / sum(seconds[axis] for seconds in spent.values())


@contextmanager
def _watching(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """While it lasts, `clock` measures the parts of a step."""

    def forward() -> str:
        return "update: forward" if torch.is_grad_enabled() else "sampling: forward"

    watched: tuple[tuple[Any, str, str | Callable[[], str]], ...] = (
        (trainer.model, "forward", forward),
        (Batch, "_sample", "sampling: softmax, draw"),
        *((RowCache, name, "sampling: keys and values") for name in ("write_next", "insert", "move")),
        (train.losses, "token_logprobs", "update: loss"),
        (train.losses, "grpo_loss", "update: loss"),
        (train.losses, "token_entropy", "update: loss"),
        (torch.Tensor, "backward", "update: backward"),
        (torch.nn.utils, "clip_grad_norm_", "update: optimiser"),
        (trainer.optimizer, "step", "update: optimiser"),
        (Batch, "join", "rows of the batch"),
        (Batch, "step", "rows of the batch"),
        (type(trainer.driver.source), "task", "drawing tasks"),
        (Episode, "__init__", "episode: begin"),
        (Episode, "observe", "episode: observe"),
        (Episode, "submit", "episode: parse"),
        (Episode, "resolve", "episode: carry out"),
        (Driver, "_embed", "embedding"),
        (ChatTokenizer, "prompt_ids", "chat to ids"),
        (ChatTokenizer, "text", "ids to text"),
        (train.grpo, "make_samples", "samples, packing"),
        (train.packing, "pack_samples", "samples, packing"),
        (train.packing, "packed_logits", "samples, packing"),
    )
    if trainer.sampled is not trainer.model:
        watched += ((trainer.sampled, "forward", forward),)
    with ExitStack() as stack:
        for owner, name, part in watched:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), part)))
        yield


# ------------------------------------------------------------------------------------------------------------ beside TRL


@dataclass(frozen=True, slots=True)
class AgainstTRL:
    """Medians over steps. A ratio is TRL's time by ours in the same round: above 1, ours is faster."""

    model: str
    trl: str  # its version
    settings: dict[str, Any]  # TRL's
    rollouts: int  # a step
    prompt_tokens: int  # of each
    reply_tokens: int  # of each
    seconds: dict[str, float]  # ours and trl: generation, update, step; on the wall
    tokens_per_second: dict[str, float]  # of a step, prompts and replies
    ratio_wall: dict[str, float]  # generation, update, step
    ratio_cpu: dict[str, float]
    threads: int


def measure_against_trl(
    folder: Path,
    *,
    steps: int,
    groups: int = 8,
    group_size: int = 16,
    prompt_words: int = 98,
    reply_tokens: int = 32,
    micro_batches: int = 1,
) -> AgainstTRL:
    """Makes a step of both to warm up, then measures `steps` of both in turn.

    Args:
        prompt_words: With the template's tokens, these make a prompt.
        micro_batches: Of TRL's update; ours packs into one what TRL pads.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl import __version__ as version

    rng = np.random.default_rng(0)
    chats: list[list[Message]] = [
        [{"role": "user", "content": " ".join(rng.choice(vocabulary(), size=prompt_words))}] for _ in range(groups)
    ]
    clock = Clock()
    rounds: list[dict[str, Seconds]] = []
    settings: dict[str, Any] = {
        "per_device_train_batch_size": groups * group_size // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_generations": group_size,
        "max_completion_length": reply_tokens,
        "max_steps": steps + 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "loss_type": "dapo",  # a mean over the tokens of the step, as ours
        "scale_rewards": "none",
        "use_vllm": False,
        "bf16": False,
        "activation_checkpointing": False,
    }
    with tempfile.TemporaryDirectory() as out:
        endless = _never_ending(folder, Path(out) / "model")
        ours = Trainer(
            LocalGRPOConfig(
                env_id="AtomMem-Synthetic",
                max_new_tokens=reply_tokens,
                model=str(endless),
                out=Path(out) / "ours",
                steps=steps + 1,
                groups=groups,
                group_size=group_size,
                learning_rate=1e-6,
                eval_every=0,
            )
        )

        class Ours(TrainerCallback):
            """A step of ours after each of TRL's."""

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.take()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                with clock.part("ours update"):
                    _step(ours, chats, group_size, reply_tokens, clock)
                rounds.append(clock.take())

        trl = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(endless, dtype=torch.float32, local_files_only=True),
            processing_class=AutoTokenizer.from_pretrained(endless, local_files_only=True),
            reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
            train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
            args=GRPOConfig(
                **settings,
                output_dir=str(Path(out) / "trl"),
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            callbacks=[Ours()],
        )
        trl.remove_callback(PrinterCallback)
        with patch.object(trl, "_generate", clock.timed(trl._generate, "trl generation")):
            trl.train()
        ours.tensorboard.close()
        prompt_tokens = len(ours.chat.prompt_ids(chats[0]))
    tokens = groups * group_size * (prompt_tokens + reply_tokens)
    if trl.state.num_input_tokens_seen != tokens * (steps + 1):
        raise AssertionError(f"TRL saw {trl.state.num_input_tokens_seen} tokens, not {steps + 1} times {tokens}")
    rounds = [_with_whole_step(spent) for spent in rounds[1:]]
    seconds = {part: statistics.median(spent[part][0] for spent in rounds) for part in sorted(rounds[0])}

    def ratios(axis: Literal[0, 1]) -> dict[str, float]:
        return {
            part: statistics.median(spent[f"trl {part}"][axis] / spent[f"ours {part}"][axis] for spent in rounds)
            for part in ("generation", "update", "step")
        }

    return AgainstTRL(
        model=folder.name,
        trl=version,
        settings=settings,
        rollouts=groups * group_size,
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        seconds=seconds,
        tokens_per_second={part: tokens / of_part for part, of_part in seconds.items()},
        ratio_wall=ratios(0),
        ratio_cpu=ratios(1),
        threads=torch.get_num_threads(),
    )


def _step(
    trainer: Trainer, chats: Sequence[Sequence[Message]], group_size: int, reply_tokens: int, clock: Clock
) -> None:
    """A step of ours on chats of one turn: the calls that `Trainer.train_step` makes."""
    with clock.part("ours generation"):
        prompts = [trainer.chat.prompt_ids(chat) for chat in chats for _ in range(group_size)]
        seeds = np.random.default_rng(trainer.step).integers(2**31, size=len(prompts)).tolist()
        replies = trainer.sampler.generate(prompts, max_new_tokens=reply_tokens, temperature=1.0, seeds=seeds)
    assert {len(reply.completion_ids) for reply in replies} == {reply_tokens}
    nothing = Observation(
        phase="", questions="", question="", chunk="", scratchpad="", query="", retrieved="", notice="",
        step=0, steps_left=0,
    )  # fmt: skip
    rollouts = [
        Rollout("", seed, (Turn(nothing, reply, ()),), float(index % 2), StopReason.ANSWERED)
        for index, (seed, reply) in enumerate(zip(seeds, replies, strict=True))
    ]
    groups = [rollouts[start : start + group_size] for start in range(0, len(rollouts), group_size)]
    trainer.update(make_samples(groups, group_advantages([[one.reward for one in group] for group in groups])))
    trainer.step += 1


def _with_whole_step(spent: dict[str, Seconds]) -> dict[str, Seconds]:
    """Adds the sums, and calls TRL's whatever is neither its generation nor ours: its loop runs all the time."""
    spent = {("trl update" if part == OTHER else part): seconds for part, seconds in spent.items()}
    for who in ("ours", "trl"):
        generation, update = spent[f"{who} generation"], spent[f"{who} update"]
        spent[f"{who} step"] = generation[0] + update[0], generation[1] + update[1]
    return spent


def _never_ending(folder: Path, out: Path) -> Path:
    """A copy of a model whose replies end with a token that it does not have, and so never."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # else they name the one it knows
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


# ---------------------------------------------------------------------------------------------------------------- tables


def untrained_model(out: Path) -> Path:
    """Writes the model of `train.tiny_base` as it is before its training."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, 0).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def shares_table(shares: Shares) -> Table:
    """A line for each part, those of the model first."""
    title = (
        f"A step of {shares.rollouts} rollouts of {shares.turns:.1f} turns, {shares.model}: {shares.seconds:.2f} s\n"
        f"{shares.prompt_tokens:.0f} tokens a prompt, {shares.reply_tokens:.0f} a reply, {shares.threads} threads"
    )
    table = Table(title=title)
    for column in ("", "% of wall time", "% of processor time"):
        table.add_column(column, justify="left" if not column else "right")
    for part, share in shares.wall.items():
        table.add_row(part, f"{100 * share:.1f}", f"{100 * shares.cpu[part]:.1f}", end_section=part == MODEL_PARTS[-1])
    table.add_section()
    table.add_row("outside the model", f"{100 * shares.outside_wall:.1f}", f"{100 * shares.outside_cpu:.1f}")
    return table


def trl_table(result: AgainstTRL) -> Table:
    """A line for generation, update and the whole step."""
    title = (
        f"A step of {result.rollouts} replies of {result.reply_tokens} tokens to {result.prompt_tokens}, {result.model}\n"
        f"beside TRL {result.trl}, {result.threads} threads"
    )
    table = Table(title=title)
    for column in ("", "ours, s", "TRL, s", "ours, tokens/s", "TRL, tokens/s", "times as fast", "by processor time"):
        table.add_column(column, justify="left" if not column else "right")
    for part in result.ratio_wall:
        table.add_row(
            part,
            *(f"{result.seconds[f'{who} {part}']:.2f}" for who in ("ours", "trl")),
            *(f"{result.tokens_per_second[f'{who} {part}']:,.0f}" for who in ("ours", "trl")),
            f"{result.ratio_wall[part]:.2f}",
            f"{result.ratio_cpu[part]:.2f}",
        )
    return table


def main(
    *,
    out: Path | None = None,
    model: Path | None = None,
    parts: tuple[Literal["shares", "trl"], ...] = ("shares", "trl"),
    steps: int = 5,
) -> None:
    """Measure whole steps of GRPO and print tables.

    Args:
        out: JSON file for the numbers.
        model: Folder of a Hugging Face chat model; an untrained tiny one where it is left out.
        parts: Where the time goes, and how fast it is beside TRL.
        steps: Steps of each that are timed.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    console = Console()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = model or untrained_model(Path(folder) / "untrained-tiny")
        if "shares" in parts:
            shares = measure_shares(model, steps=steps)
            console.print(shares_table(shares))
            results["shares"] = asdict(shares)
        if "trl" in parts:
            against = measure_against_trl(model, steps=steps)
            console.print(trl_table(against))
            results["trl"] = asdict(against)
    write_figures(out, results)


if __name__ == "__main__":
    tyro.cli(main)
