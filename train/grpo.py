"""`atommem grpo`: reinforcement learning on this machine, from a model that can already play.

    atommem grpo AtomMem-Synthetic --model runs/sft/model --layout terse --out runs/grpo

Each step plays `groups` tasks `group_size` times, compares every rollout with the mean of its group, and makes one update on
all their turns: on-policy GRPO (DeepSeekMath, arXiv 2402.03300) with the AtomMem paper's settings (arXiv 2601.08323). What
was sampled is what is trained: the token ids, once each, and a rollout that the infrastructure lost takes its group out.

The folder `--out` then holds `model/` (Hugging Face; the best of the evaluations, in each of which the same held-out episodes
are played greedily), `metrics.jsonl` and `tensorboard/` (every step), `curve.png`, `config.json`, and `checkpoint.pt`, from which
`--resume` continues as if the run had never been stopped; with more `--steps` a finished run is extended, and only its last
evaluation and checkpoint are additional. What is left out: more than one process (that is `train/cluster`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from agents.chat_policy import ChatPolicy, Sampling
from agents.event_loop import run_blocking
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.models.transformers_model import TransformersModel
from agents.rollout import Driver, EpisodeSpec, episode_specs
from atommem_env.errors import CheckpointError, DataError, MissingDependency, SettingError
from atommem_env.tokens import get_tokenizer
from atommem_env.types import Rollout
from eval.metrics import episode_record, summarise
from eval.played_as import eval_command, record_of, write_card
from eval.progress import step_progress
from eval.provenance import add_session
from eval.run_folder import read_config, read_jsonl, to_jsonl, write_atomic
from train.advantages import group_advantages
from train.estimate import check_memory
from train.metrics import policy_metrics, training_rewards
from train.overlap import overlap_warning
from train.samples import Sample, check_all_trained, make_samples
from train.settings import GRPOConfig, LocalGRPOConfig, make_env, open_run

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
_RETRIES = 2  # of an episode that the infrastructure failed


class Trainer:
    """The state of a run: a model, its optimiser, how many steps were made, and the best model so far."""

    def __init__(self, run: LocalGRPOConfig, console: Console | None = None) -> None:
        try:
            import torch
            from torch.utils.tensorboard import SummaryWriter
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error
        from train.checkpoints import check_disk
        from train.losses import LossConfig
        from train.packing import use_packed_attention

        disable_progress_bar()  # of loading and saving: ours shows more
        self.run = run
        self.console = console or Console(stderr=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.step = 0
        self.best: dict[str, Any] = {"em": -1.0, "step": 0, "weights": None}
        self.loss = LossConfig(
            clip_low=run.clip_low, clip_high=run.clip_high, kl_coef=run.kl_coef, importance_cap=run.importance_cap
        )
        check_memory(run)
        resolved_config = open_run(run, extendable="steps")
        _check_extension(run)
        self.environment = record_of(run)  # for the model's folder
        self.driver = Driver.of(make_env(run, run.split))
        self.held_out = Driver.of(make_env(run, run.eval_split)) if run.eval_every else None
        for driver in filter(None, (self.driver, self.held_out)):
            if not len(driver.source):
                raise DataError(f"The {driver.source.dataset} source has no tasks; choose another --split.")
        warning = overlap_warning(self.driver.source, self.held_out.source) if self.held_out else None
        if warning:
            self.console.print(warning, soft_wrap=True, markup=False, highlight=False)
        self.specs = episode_specs(len(self.driver.source), run.steps * run.groups, run.seed)
        torch.manual_seed(run.seed)
        self.chat = ChatTokenizer(find_model(run.model))
        self.model = self._load()
        self.sampled = self.model  # the module that replies are drawn from
        if run.dtype == "bfloat16" and not run.lora_rank:
            self.sampled = copy.deepcopy(self.model).requires_grad_(False)
            # Not `.to`, which would round buffers too: the rotary frequencies, which turn late tokens by radians.
            for weight in self.sampled.parameters():
                weight.data = weight.data.to(torch.bfloat16)
        self.sampler = TransformersModel.of(self.sampled, self.chat, name=Path(run.model).name, max_batch=run.in_flight)
        use_packed_attention(self.model)  # now that the sampler has seen which attention it replaces
        self.reference = None  # adapters can be switched off; a full model needs a second one
        if run.kl_coef and not run.lora_rank:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        if run.resume:
            self._resume()
        else:
            check_disk(run.out, 4 * sum(weight.numel() * 4 for weight in trained))  # weights, two moments, the best
        write_atomic(run.out / "config.json", resolved_config)  # resumed too: it may have more steps now
        add_session(run.out)
        self.tensorboard = SummaryWriter(str(run.out / "tensorboard"), purge_step=self.step + 1)

    # ------------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Trains to the end, writes `model/`, and returns the last line of `metrics.jsonl`."""
        run = self.run
        with step_progress(self.console) as progress:
            bar = progress.add_task("GRPO", total=run.steps, completed=self.step, status="")
            if self.step == 0 and run.eval_every:
                self._log({"step": 0, **self.evaluate()})
            while self.step < run.steps:
                line = self.train_step()
                if run.eval_every and (self.step % run.eval_every == 0 or self.step == run.steps):
                    line |= self.evaluate()
                self._log(line)
                if self.step % run.save_every == 0 or self.step == run.steps:
                    self.save()
                status = f"reward {line['reward']:.3f}, best held-out EM {max(self.best['em'], 0):.3f}"
                progress.update(bar, completed=self.step, status=status)
        self.tensorboard.close()
        self.export()
        return read_jsonl(run.out / METRICS)[-1]

    def train_step(self) -> dict[str, Any]:
        """Plays one step's groups and makes one update; returns its metrics."""
        started = time.perf_counter()
        groups = self.play_groups()
        rewards = [[rollout.reward if rollout else None for rollout in group] for group in groups]
        advantages = group_advantages(
            training_rewards(groups, self.run.fault_penalty), divide_by_std=self.run.divide_by_std
        )
        if advantages.failed_groups == len(groups):
            raise SettingError(
                f"Every group of step {self.step + 1} lost a rollout {_RETRIES + 1} times over; the warnings above say why. "
                f"Fix the cause and resume with --resume from step {self.step // self.run.save_every * self.run.save_every}."
            )
        samples = make_samples(groups, advantages)
        played = time.perf_counter()
        update = self.update(samples)
        self.step += 1
        return {
            "step": self.step,
            "reward": fmean(reward for group in rewards for reward in group if reward is not None),
            "groups_active": advantages.active_groups,
            "groups_zero_variance": advantages.zero_variance_groups,
            "groups_failed": advantages.failed_groups,
            **policy_metrics([rollout for group in groups for rollout in group if rollout]),
            **update,
            "seconds_rollouts": played - started,
            "seconds_update": time.perf_counter() - played,
        }

    def play_groups(self) -> list[list[Rollout | None]]:
        """The rollouts [groups][group_size] of the next step: the same tasks and draws whenever it is played."""
        run = self.run
        tasks = self.specs[self.step * run.groups : (self.step + 1) * run.groups]
        specs = [
            EpisodeSpec(task.index, task.task_seed, seed)
            for task in tasks
            for seed in np.random.default_rng(task.seed).integers(2**31, size=run.group_size).tolist()
        ]
        policy = self._policy(run.temperature)
        rollouts = run_blocking(self.driver.run_with_retries(specs, policy, in_flight=run.in_flight, retries=_RETRIES))
        return [rollouts[start : start + run.group_size] for start in range(0, len(rollouts), run.group_size)]

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimiser step on the mean loss over all trained tokens of `samples`; returns metrics.

        Raises:
            SamplesMismatch: a sample was left out or trained on twice.
            DataError: the gradient is not finite; the weights are as before.
        """
        import torch

        from train.losses import grpo_loss, token_entropy, token_logprobs
        from train.packing import pack_samples, packed_logits

        run = self.run
        learning_rate = self._learning_rate()
        metrics: dict[str, float] = defaultdict(float)
        if samples:
            total = sum(sample.trained_tokens for sample in samples)
            batches = pack_samples(samples, run.micro_batch_tokens, share_prefixes=run.share_prefixes)
            trained: list[Any] = []
            gap_max = 0.0
            # In eval mode, as it samples: dropout would train another distribution. Checkpointing needs the other mode.
            self.model.train(run.gradient_checkpointing)
            for batch in batches:
                targets, sampled, advantages = (
                    torch.from_numpy(array).to(self.device)
                    for array in (batch.targets_N, batch.logprobs_N, batch.advantages_N)
                )
                with self._autocast():
                    logits = packed_logits(self.model, batch)
                    reference = self._reference_logprobs(batch, targets) if run.kl_coef else None
                logp = token_logprobs(logits, targets, run.temperature)
                # One update a step: the policy before it is the policy itself, and only the gradient distinguishes them.
                loss, parts = grpo_loss(
                    logp, logp.detach(), sampled, advantages,
                    total_tokens=total, reference_N=reference, settings=self.loss,
                )  # fmt: skip
                loss.backward()
                gap = (logp.detach() - sampled).abs()
                gap_max = max(gap_max, gap.max().item())
                for name, value in parts.items():
                    metrics[name] += float(value)
                metrics["entropy"] += token_entropy(logits.detach(), run.temperature).sum().item() / total
                metrics["logprob_gap_mean"] += gap.sum().item() / total
                trained += batch.keys
            check_all_trained(samples, trained)
            norm = torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], run.max_grad_norm).item()
            if not np.isfinite(norm):
                raise DataError(
                    f"The gradient of step {self.step + 1} is not finite. The weights are as before it; lower --learning-rate, "
                    "or compute in float32, and resume with --resume."
                )
            for weights in self.optimizer.param_groups:
                weights["lr"] = learning_rate
            self.optimizer.step()
            self.optimizer.zero_grad()
            tokens = sum(len(sample.token_ids) for sample in samples)
            computed = sum(len(batch.token_ids_T) for batch in batches)
            metrics |= {
                "logprob_gap_max": gap_max,  # of the sampler's log-probabilities from the trainer's
                "grad_norm": norm,
                "trained_tokens": total,
                "prefix_share": 1 - computed / tokens,  # of all tokens: those not computed again
            }
            self._sync()
        return {"samples": len(samples), "learning_rate": learning_rate, **metrics}

    def evaluate(self) -> dict[str, Any]:
        """Plays the held-out episodes greedily; remembers the weights if they are the best so far."""
        assert self.held_out is not None
        from train.checkpoints import trained_weights

        run, driver = self.run, self.held_out
        started = time.perf_counter()
        specs = episode_specs(len(driver.source), run.eval_episodes, run.seed)
        rollouts = run_blocking(driver.run(specs, self._policy(0.0), in_flight=run.in_flight))
        tokenizer = get_tokenizer(driver.settings.tokenizer)
        numbers = summarise([episode_record(number, rollout, tokenizer) for number, rollout in enumerate(rollouts)])
        if numbers["em"] > self.best["em"]:
            weights = {name: weight.to("cpu", copy=True) for name, weight in trained_weights(self.model).items()}
            self.best = {"em": numbers["em"], "step": self.step, "weights": weights}
        return {
            "eval_em": numbers["em"],
            "eval_em_ci95": numbers["em_ci95"],
            "eval_evidence_stored": numbers["evidence_recall"]["stored"],
            "eval_faults": round(sum(numbers["faults"].values()), 4),
            "seconds_eval": time.perf_counter() - started,
        }

    # -------------------------------------------------------------------------------------------------- what a run saves

    def save(self) -> None:
        """Writes all that `--resume` needs.

        Raises:
            CheckpointError: it could not be written; the one before is intact.
        """
        from train import checkpoints

        state = {
            "step": self.step,  # and so the position in the data and in the schedule: both are functions of it
            "weights": checkpoints.trained_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoints.random_state(),
            "best": self.best,
        }
        checkpoints.save(self.run.out / CHECKPOINT, state)

    def _resume(self) -> None:
        from train import checkpoints

        lines = []
        if (self.run.out / CHECKPOINT).exists():  # else it was stopped before the first
            state = checkpoints.load(self.run.out / CHECKPOINT)
            checkpoints.load_weights(self.model, state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            checkpoints.set_random_state(state["random"])
            self.step, self.best = state["step"], state["best"]
            self._sync()
            # What was logged after the checkpoint will be logged again.
            lines = [line for line in read_jsonl(self.run.out / METRICS) if line["step"] <= self.step]
        write_atomic(self.run.out / METRICS, "".join(map(to_jsonl, lines)))

    def export(self) -> None:
        """Writes the best model in the form of Hugging Face to `model/`, and the curve."""
        from train.checkpoints import load_weights, trained_weights
        from train.curve import draw_curve

        last = {name: weight.clone() for name, weight in trained_weights(self.model).items()}
        if self.best["weights"] is not None:
            load_weights(self.model, self.best["weights"])
        model = copy.deepcopy(self.model).merge_and_unload() if self.run.lora_rank else self.model
        partial = self.run.out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        self.chat.backend.save_pretrained(partial)
        write_card(
            partial,
            self.environment,
            self.run.max_new_tokens,
            command="atommem grpo",
            run=self.run.out,
            recipe=self.run.recipe,
        )
        shutil.rmtree(self.run.out / "model", ignore_errors=True)
        partial.rename(self.run.out / "model")
        load_weights(self.model, last)
        draw_curve(self.run.out / METRICS, self.run.out / "curve.png")

    def _log(self, line: dict[str, Any]) -> None:
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
        try:
            with (self.run.out / METRICS).open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_jsonl(rounded))
            for name, value in _numbers(line):
                self.tensorboard.add_scalar(name, value, line["step"])
        except OSError as error:
            raise CheckpointError(
                f"The metrics of step {line['step']} could not be written to {self.run.out} ({error}). The last checkpoint "
                "is intact: make room, then resume with --resume."
            ) from error

    # -------------------------------------------------------------------------------------------------------------- the model

    def _load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        run = self.run
        # What is trained is float32, also where the computing is not: a small update would be lost in a bfloat16 weight.
        dtype = getattr(torch, run.dtype if run.lora_rank else "float32")
        folder = find_model(run.model)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(self.device)
        if run.lora_rank:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules="all-linear")
            model = get_peft_model(model, adapters)
        if run.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def _policy(self, temperature: float) -> ChatPolicy:
        sampling = Sampling(temperature, self.run.max_new_tokens)
        return ChatPolicy(self.sampler, self.driver.settings, sampling, self.run.layout)

    def _sync(self) -> None:
        """Hands the trained weights to the module that is sampled from, where that is another."""
        import torch

        if self.sampled is not self.model:
            with torch.no_grad():
                for ours, theirs in zip(self.model.parameters(), self.sampled.parameters(), strict=True):
                    theirs.copy_(ours)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.dtype == "bfloat16")

    def _reference_logprobs(self, batch: Any, targets: Tensor) -> Tensor:
        """[N] of the starting model."""
        import torch

        from train.losses import token_logprobs
        from train.packing import packed_logits

        without_adapters = self.model.disable_adapter() if self.run.lora_rank else contextlib.nullcontext()
        with torch.no_grad(), without_adapters:
            return token_logprobs(packed_logits(self.reference or self.model, batch), targets, self.run.temperature)

    def _learning_rate(self) -> float:
        """Of the next update."""
        run = self.run
        if self.step < run.warmup_steps:
            return run.learning_rate * (self.step + 1) / (run.warmup_steps + 1)
        done = (self.step - run.warmup_steps) / max(run.steps - run.warmup_steps, 1)
        factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return run.learning_rate * factors[run.schedule]


def _check_extension(run: LocalGRPOConfig) -> None:
    before = read_config(run.out / "config.json").get("steps", run.steps) if run.resume else run.steps
    if before != run.steps and run.schedule != "constant":
        raise SettingError(
            f"{run.out} holds a run of {before} steps, and with --schedule {run.schedule} the learning rate of each depends on "
            f"how many there are: resume it with --steps {before}. Only a run with --schedule constant can be extended."
        )


def _numbers(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def main(run: LocalGRPOConfig) -> None:
    """Train a model by reinforcement learning (GRPO) on an environment."""
    Trainer(run).train()
    report_end(run, Console())


def report_end(run: GRPOConfig, console: Console) -> None:
    """Prints what a finished run leaves, and how to evaluate it."""
    evaluated = [line for line in read_jsonl(run.out / METRICS) if "eval_em" in line]
    if evaluated:
        best = max(evaluated, key=lambda line: line["eval_em"])  # the first of equals, as the trainers keep it
        console.print(
            f"Best held-out exact match {100 * best['eval_em']:.1f} % after {best['step']} of {run.steps} steps."
        )
    model = run.out / "model"
    console.print(
        f"The model is in {model}, the curve in {run.out / 'curve.png'}. Evaluate it:\n  {eval_command(model)}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
