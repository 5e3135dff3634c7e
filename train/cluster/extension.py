"""One rollout, many samples, on unmodified OpenRLHF: what this project replaces some of its classes by.

OpenRLHF takes a rollout for one sequence. Here a rollout is one sequence for each turn. Up to the experience maker everything
still sees one Experience a rollout, so that its buffers, its asynchronous queue and its evaluation stay right:

1. `executor.AgentExecutor` plays an episode and returns one response, with the whole rollout in it.
2. `Generator` attaches the rollout to its Experience, and replaces groups that failed or, where asked for, have zero variance.
3. `experience.ExperienceMaker` makes samples and advantages by `train.samples` and `train.advantages`, an Experience of every
   sample, and padding samples up to a multiple of the data-parallel ranks.
4. `experience.ReplayBuffer` makes one update of all samples that there are: OpenRLHF's would drop those beyond rollouts × group
   size.
5. `EngineWatch` ends the job when an engine dies: all others would wait for its part in the next weights' broadcast for ever.
6. `install` puts subclasses of the trainers' and the actor's classes where OpenRLHF finds them; Ray carries them to the workers.

After every update the samples that went into a gradient are compared with those that were made.
"""

from __future__ import annotations

import _thread
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openrlhf.trainer.ppo_trainer as sync_trainer
import openrlhf.trainer.ppo_trainer_async as async_trainer
import openrlhf.trainer.ray as ray_trainer
import openrlhf.trainer.ray.ppo_actor as ppo_actor
import openrlhf.trainer.ray.vllm_engine as vllm_engine
import ray
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from tqdm import tqdm

from atommem_env.errors import EngineDied, JobFailed, SettingError
from atommem_env.types import Rollout
from eval.run_folder import read_jsonl
from train.advantages import GroupAdvantages
from train.cluster.experience import ExperienceMaker, ReplayBuffer, step_advantages, trained_keys
from train.cluster.metrics import MetricsLogger, flatten_stats
from train.cluster.recipe import REPLACEMENTS, VERSION, ClusterGRPOConfig, Prompt, add_card, read_run
from train.grpo import METRICS
from train.samples import check_all_trained

_WATCH = 5.0  # seconds between looks at the engines
_LAST_STEP = "last step?"  # what the sampling half asks the training half in the end


# -------------------------------------------------------------------------------------------------------------- the rollouts


class Generator(SamplesGenerator):
    """Draws the prompts of a step and has the engines play them."""

    def _generate_vllm(
        self, dataloader_iter: Iterator[Any], num_prompts: int, dynamic_filtering: bool, **options: Any
    ) -> tuple[list[Experience], int, bool]:
        """The Experiences of the prompts, one a rollout, a prompt's together and in the order of their positions.

        Raises:
            JobFailed: as many groups were lost as there are prompts: this is no accident of one episode.
        """
        batch = list(itertools.islice(dataloader_iter, num_prompts))
        prompts = [prompt for _, texts, _, _ in batch for prompt in texts]
        groups: dict[int, list[Experience]] = {}
        lost: dict[str, int] = {"groups_failed": 0, "groups_filtered": 0, "groups_replaced": 0}
        pending = self._play(prompts, options)
        bar = tqdm(total=len(prompts), desc="Rollouts")
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            prompt = pending.pop(done)
            responses = ray.get(done)
            rollouts = [response["rollout"] for response in responses]
            advantages = self._advantages(rollouts) if len(rollouts) > 1 else None
            failed = None in rollouts
            if not failed and not (dynamic_filtering and advantages and not advantages.active_groups):
                groups[Prompt.of(prompt).position] = [self._experience(response, options) for response in responses]
                bar.update()
                continue
            lost["groups_failed" if failed else "groups_filtered"] += 1
            if lost["groups_failed"] >= len(prompts):
                why = next(response["lost"] for response in responses if response["rollout"] is None)
                raise JobFailed(
                    f"As many groups of a step as it has, {len(prompts)}, lost an episode that was tried {self._run.retries + 1} "
                    f"times. Fix the cause, then resume with --resume. The last: {why}"
                )
            replacement = self._replacement(prompt)
            if replacement and Prompt.of(prompt).split == "train":
                lost["groups_replaced"] += 1
                pending |= self._play([replacement], options)
        experiences = [experience for position in sorted(groups) for experience in groups[position]]
        for experience in experiences[:1]:
            experience.generation = lost  # travels with the batch, through the queue of asynchronous training too
        return experiences, len(prompts), len(batch) < num_prompts

    def _play(self, prompts: Sequence[str], options: dict[str, Any]) -> dict[Any, str]:
        """The references of the responses to come, each with its prompt."""
        references = self._dispatch_prompts_to_vllm(prompts, [""] * len(prompts), **options)
        return dict(zip(references, prompts, strict=True))

    def _experience(self, response: dict[str, Any], options: dict[str, Any]) -> Experience:
        experience = self._process_response_into_experience(response, **options)
        experience.rollout = response["rollout"]
        return experience

    def _advantages(self, rollouts: Sequence[Rollout | None]) -> GroupAdvantages:
        return step_advantages([rollouts], self._run)

    def _replacement(self, prompt: str) -> str | None:
        """The prompt to play instead of `prompt`; None when its replacements are used up."""
        chain = self._replacements[Prompt.of(prompt).position :: len(self._replacements) // REPLACEMENTS]
        after = chain.index(prompt) + 1 if prompt in chain else 0
        return chain[after] if after < len(chain) else None

    @cached_property
    def _run(self) -> ClusterGRPOConfig:
        return read_run()

    @cached_property
    def _replacements(self) -> list[str]:
        return [line["prompt"] for line in read_jsonl(self._run.out / "replacements.jsonl")]


# --------------------------------------------------------------------------------------------------------------- the actors


def _modified(actor_class: Any) -> Any:
    """The class that `ray.remote` was put around."""
    return actor_class.__ray_metadata__.modified_class


class PolicyActor(_modified(ppo_actor.PolicyModelActor)):  # type: ignore[misc]
    """A data-parallel rank of the policy that is trained."""

    def init_model_from_pretrained(self, *args: Any, **options: Any) -> None:
        super().init_model_from_pretrained(*args, **options)
        self.trainer.replay_buffer.__class__ = ReplayBuffer
        if self.strategy.args.ds.zero_stage < 3:
            self._accumulate()

    def _accumulate(self) -> None:
        """Adds up the gradients of all micro-batches of an update.

        OpenRLHF declares every micro-batch to DeepSpeed as an update's last. Stage 3 adds up all the same; stage 2 then uses a
        part of the gradient alone, with no error (a norm of 0.23 for 0.42 in our test of three micro-batches).
        """
        trainer, step = self.trainer, self.trainer.training_step

        def training_step(experience: Experience, kl_ctl: float, number: int, *rest: Any) -> Any:
            last = bool(trainer.replay_buffer.dynamic_optimizer_step[number])
            self.actor.model.set_gradient_accumulation_boundary(last)
            return step(experience, kl_ctl, number, *rest)

        trainer.training_step = training_step

    def trained_labels(self) -> list[str]:
        """The labels of the samples that this rank took into its last update."""
        taken: list[str] = self.trainer.replay_buffer.taken
        return taken

    def export(self, folder: str) -> None:
        """Writes the model in the form of Hugging Face; all ranks at the same time."""
        self.strategy.save_model(self.actor, self.tokenizer, folder)


# ----------------------------------------------------------------------------------------------------------------- the trainers


class _Turns:
    """Mixed into OpenRLHF's trainers."""

    args: Any
    actor_model_group: Any
    experience_maker: ExperienceMaker

    def _use_turns(self: Any) -> None:
        self.run = read_run()
        self.experience_maker = ExperienceMaker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
        )
        self.tensorboard_logger = MetricsLogger(self.run.out / METRICS, self.tensorboard_logger)

    def init_checkpoint_states(self: Any) -> dict[str, Any]:
        states: dict[str, Any] = super().init_checkpoint_states()  # type: ignore[misc]
        self.tensorboard_logger.truncate(states["global_step"])
        return states

    def train_step(self: Any, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        self._step = global_step + 1
        group_starts = rollout_samples[:: self.run.group_size]
        self.tensorboard_logger.positions = sorted(Prompt.of(start.prompts[0]).position for start in group_starts)
        samples = self.experience_maker.prepare(rollout_samples)
        if not samples:  # no group has variance: the gradient would be zero
            return {**flatten_stats(self.experience_maker.stats), "policy_loss": 0.0}, self._step
        status, step = super().train_step(rollout_samples, global_step)  # type: ignore[misc]
        group = self.actor_model_group
        labels = ray.get(group.async_run_method("trained_labels"))[:: group.duplicate_actors]
        check_all_trained(samples, trained_keys(itertools.chain.from_iterable(labels)))
        return status, step

    def _compute_rollout_stats(self: Any, experiences: list[Experience]) -> dict[str, Any]:
        return flatten_stats(self.experience_maker.stats)

    def save_best_checkpoint(
        self: Any, eval_metrics: dict[str, Any], global_step: int, client_states: dict[str, Any] | None = None
    ) -> None:
        """Exports the model whenever it is the best so far: what `atommem eval` and `vllm serve` take as it is."""
        em = eval_metrics.get("eval_held_out_pass1")
        self._latest_eval_metric_value = em
        if em is not None and em > self.best_eval_metric_value:
            self.best_eval_metric_value = em
            ray.get(self.actor_model_group.async_run_method("export", folder=str(self.run.out / "model")))
            add_card(self.run)


class PPOTrainer(_Turns, _modified(sync_trainer.PPOTrainer)):  # type: ignore[misc]
    """The synchronous trainer; also evaluates before the first step and after the last."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._use_turns()
        self.samples_generator: Generator = _generator(self.samples_generator)

    def fit(self, global_step: int = 0) -> None:
        starting = not (self.args.ckpt.load_enable and Path(self.args.ckpt.path, "_actor").exists())
        if self.eval_dataloader and starting:
            self._evaluate(0)
        super().fit(global_step)
        if self.eval_dataloader and self._step % self.args.eval.steps:
            self._evaluate(self._step)

    def _evaluate(self, step: int) -> None:
        options = {
            "temperature": self.args.eval.temperature,
            "n_samples_per_prompt": self.args.eval.n_samples_per_prompt,
        }
        self.save_best_checkpoint(self.evaluate(step, **self.generate_kwargs | options), step)


class TrainingActor(_Turns, _modified(async_trainer.TrainingActor)):  # type: ignore[misc]
    """The training half of asynchronous training."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._use_turns()
        self._step = 0
        get = self.rollout_queue.get

        def get_payload(block: bool) -> Any:
            while (payload := get(block=block)) == _LAST_STEP:
                self.rollout_slots.put((_LAST_STEP, self._step), block=True)
            return payload

        self.rollout_queue.get = get_payload


class GenerateSamplesActor(_modified(async_trainer.GenerateSamplesActor)):  # type: ignore[misc]
    """The sampling half of asynchronous training; also evaluates before the first step and after the last."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.samples_generator: Generator = _generator(self.samples_generator)
        put = self.rollout_queue.put

        def put_payload(payload: Any, block: bool) -> None:
            if payload == "done" and self.eval_dataloader:
                put(_LAST_STEP, block=True)  # is read, and answered, when all that was sampled has been trained on
                while not isinstance(answer := self.rollout_slots.get(block=True), tuple):
                    pass  # a step's number: room for one more batch, of which there is none
                if answer[1] != self._last_eval_step:
                    put(("eval", answer[1], self._run_eval()), block=True)
            put(payload, block=block)

        self.rollout_queue.put = put_payload

    def fit(self, episode: int, total_consumed_prompts: int) -> None:
        if self.eval_dataloader and total_consumed_prompts == 0:
            step = self.rollout_slots.get(block=True)  # given back by the trainer when it has read the result
            self.rollout_queue.put(("eval", step, self._run_eval()), block=True)
        super().fit(episode, total_consumed_prompts)


def _generator(theirs: SamplesGenerator) -> Generator:
    return Generator(
        theirs.strategy, theirs.prompts_dataloader, theirs.eval_dataloader, theirs.tokenizer, theirs.vllm_engines
    )


def install() -> EngineWatch:
    """Puts our classes where OpenRLHF's command line finds them. Call it in the job's driver, before that.

    Raises:
        SettingError: another version of OpenRLHF is installed.
    """
    if (installed := version("openrlhf")) != VERSION:
        raise SettingError(
            f"This trainer is written for OpenRLHF {VERSION}, and {installed} is installed: pip install openrlhf=={VERSION}"
        )
    sync_trainer.PPOTrainer = ray.remote(PPOTrainer)
    # Ray pickles PPOTrainerAsync by value, and with it these globals of its module.
    async_trainer.TrainingActor = ray.remote(TrainingActor)
    async_trainer.GenerateSamplesActor = ray.remote(GenerateSamplesActor)
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(PolicyActor)
    vllm_engine.RolloutRayActor = ray.remote(Engine)
    watch = EngineWatch()
    ray_trainer.create_vllm_engines = watch.create
    return watch


# ---------------------------------------------------------------------------------------------------------------- the engines


class Engine(_modified(vllm_engine.RolloutRayActor)):  # type: ignore[misc]
    """An engine that can be asked how it is."""

    async def check(self) -> None:
        """
        Raises:
            EngineDied: the engine's process is gone.
        """
        if self.llm.errored:
            raise EngineDied(f"An engine died: {self.llm.dead_error}")


class EngineWatch(threading.Thread):
    """Asks all engines, again and again; once one has died it interrupts the main thread, and `cause` is why."""

    cause: Exception | None = None

    def __init__(self) -> None:
        super().__init__(name="engine watch", daemon=True)
        self.engines: list[Any] = []

    def create(self, *args: Any, **options: Any) -> list[Any]:
        """`create_vllm_engines`, with this thread started on what it made."""
        self.engines = vllm_engine.create_vllm_engines(*args, **options)
        self.start()
        return self.engines

    def run(self) -> None:
        while True:
            try:
                ray.get([engine.check.remote() for engine in self.engines])
            except Exception as error:
                self.cause = error
                _thread.interrupt_main()
                return
            time.sleep(_WATCH)
