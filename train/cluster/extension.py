"""One rollout, many samples, on unmodified OpenRLHF: what this project puts in the place of some of its classes.

OpenRLHF takes a rollout for one sequence. Here a rollout is one sequence for each turn. Up to the experience maker everything
keeps seeing one Experience a rollout, so that its buffers, its asynchronous queue and its evaluation stay right:

1. `executor.AgentExecutor` plays an episode and returns one response, with the whole rollout in it.
2. `Generator` hangs the rollout on its Experience, and replaces groups that failed or, where asked for, are flat.
3. `ExperienceMaker` makes samples and advantages by `train.samples` and `train.advantages`, and an Experience of every sample.
4. Pads fill the batch up to a multiple of the data-parallel ranks. A pad keeps one trained token, of advantage 0, because a
   micro-batch without any would divide by zero; so each pad weighs one token in the loss's mean. They are counted (`pads`).
5. `ReplayBuffer` makes one update of all samples that there are: OpenRLHF's would drop those beyond rollouts × group size.
6. `EngineWatch` ends the job when an engine dies: everyone else would wait for its part in the next weights' broadcast for ever.
7. `install` puts subclasses of the trainers' and the actor's classes where OpenRLHF finds them; Ray carries them to the workers.

After every update the samples that went into a gradient are compared with those that were made.
"""

from __future__ import annotations

import _thread
import copy
import itertools
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import openrlhf.trainer.ppo_trainer as sync_trainer
import openrlhf.trainer.ppo_trainer_async as async_trainer
import openrlhf.trainer.ray as ray_trainer
import openrlhf.trainer.ray.ppo_actor as ppo_actor
import openrlhf.trainer.ray.vllm_engine as vllm_engine
import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from tqdm import tqdm

from atommem_env.errors import EngineDied, JobFailed, SettingError
from atommem_env.types import Rollout
from eval.run_folder import read_jsonl, to_jsonl, write_atomic
from train.advantages import GroupAdvantages, group_advantages
from train.cluster.recipe import SPARES, VERSION, ClusterGRPOConfig, Prompt, add_card, running
from train.metrics import policy_metrics, training_rewards
from train.samples import Sample, SampleKey, check_all_trained, make_samples

METRICS = "metrics.jsonl"
_ROLLOUT = "rollout/"  # before the names of the numbers that are about rollouts and turns
_WATCH = 5.0  # seconds between looks at the engines
_PAD = ""  # the label of a pad
_LAST_STEP = "last step?"  # what the sampling half asks the training half in the end
# What OpenRLHF calls a number → what `atommem grpo` calls it, in metrics.jsonl; TensorBoard and wandb show both.
_NAMES = {
    "policy_loss": "policy_loss",
    "ppo_clip_ratio": "clip_fraction",
    "ppo_kl": "approx_kl",
    "vllm_kl": "sampler_kl",
    "kl": "reference_kl",
    "entropy_loss": "entropy",
    "actor_grad_norm": "grad_norm",
    "actor_lr": "learning_rate",
    "timing/generation": "seconds_rollouts",
    "timing/make_experience": "seconds_logprobs",
    "timing/ppo_train": "seconds_update",
    "timing/broadcast": "seconds_sync",
    "timing/step_total": "seconds",
}


# ------------------------------------------------------------------------------------------------- from rollouts to samples


class Generator(SamplesGenerator):
    """Draws the prompts of a step and has the engines play them."""

    def _generate_vllm(
        self, dataloader_iter: Iterator[Any], num_prompts: int, dynamic_filtering: bool, **options: Any
    ) -> tuple[list[Experience], int, bool]:
        """The Experiences of the prompts, one a rollout, a prompt's together and in the order of their places.

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
                groups[Prompt.of(prompt).place] = [self._experience(response, options) for response in responses]
                bar.update()
                continue
            lost["groups_failed" if failed else "groups_filtered"] += 1
            if lost["groups_failed"] >= len(prompts):
                why = next(response["lost"] for response in responses if response["rollout"] is None)
                raise JobFailed(
                    f"As many groups of a step as it has, {len(prompts)}, lost an episode that was tried {self._run.retries + 1} "
                    f"times. Mend the cause and go on with --resume. The last: {why}"
                )
            spare = self._spare(prompt)
            if spare and Prompt.of(prompt).split == "train":
                lost["groups_replaced"] += 1
                pending |= self._play([spare], options)
        experiences = [experience for place in sorted(groups) for experience in groups[place]]
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

    def _spare(self, prompt: str) -> str | None:
        """The prompt to play in the place of `prompt`; None when its spares are used up."""
        chain = self._spares[Prompt.of(prompt).place :: len(self._spares) // SPARES]
        after = chain.index(prompt) + 1 if prompt in chain else 0
        return chain[after] if after < len(chain) else None

    @property
    def _run(self) -> ClusterGRPOConfig:
        if not hasattr(self, "_running"):
            self._running = running()
        return self._running

    @property
    def _spares(self) -> list[str]:
        if not hasattr(self, "_spare_prompts"):
            self._spare_prompts = [line["prompt"] for line in read_jsonl(self._run.out / "spares.jsonl")]
        return self._spare_prompts


def step_advantages(rollouts_P_G: Sequence[Sequence[Rollout | None]], run: ClusterGRPOConfig) -> GroupAdvantages:
    """The advantages of a step, exactly as `train.grpo` has them."""
    return group_advantages(training_rewards(rollouts_P_G, run.fault_penalty), divide_by_std=run.divide_by_std)


def sample_experience(sample: Sample, reward: float) -> Experience:
    """A sample as an Experience of one row: sequences [1, T], and [1, T - 1] where it is about the targets."""
    length = len(sample.token_ids)
    action_mask = torch.zeros(1, length - 1, dtype=torch.long)
    logprobs = torch.zeros(1, length - 1)
    places = torch.cat([torch.arange(first - 1, last - 1) for first, last in sample.trained])
    action_mask[0, places] = 1
    logprobs[0, places] = torch.tensor(sample.logprobs)
    return Experience(
        sequences=torch.tensor([sample.token_ids]),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        action_mask=action_mask,
        rollout_log_probs=logprobs,
        prompts=[""],
        labels=[json.dumps(sample.key)],  # comes back from the trainer as proof of having been trained on
        images=[None],
        mm_train_inputs=[None],
        rewards=torch.tensor([reward]),
        scores=torch.tensor([reward]),
        response_length=torch.tensor([sample.trained_tokens]),
        truncated=torch.tensor([False]),
        total_length=torch.tensor([float(length)]),
        info={"reward": torch.tensor([reward])},
    )


def pad_experience(experience: Experience) -> Experience:
    """A copy with one trained token; it is given advantage 0."""
    pad = copy.deepcopy(experience)
    first = int(pad.action_mask[0].argmax())
    pad.action_mask.zero_()
    pad.action_mask[0, first] = 1
    pad.labels = [_PAD]
    return pad


class ExperienceMaker(RemoteExperienceMaker):
    """Makes what is trained on: an Experience of every turn, with the advantage of its rollout."""

    samples: list[Sample]  # of the step
    stats: dict[str, Any]

    def prepare(self, rollout_samples: Sequence[Experience]) -> list[Sample]:
        """The samples of a step, from its Experiences of one rollout each; there may be none to learn from."""
        run = running()
        rollouts = [experience.rollout for experience in rollout_samples]
        rollouts_P_G = [rollouts[start : start + run.group_size] for start in range(0, len(rollouts), run.group_size)]
        advantages = step_advantages(rollouts_P_G, run)
        self.samples = make_samples(rollouts_P_G, advantages)
        self._rewards = {
            (group, index): rollout.reward
            for group, row in enumerate(rollouts_P_G)
            for index, rollout in enumerate(row)
        }
        self.stats = {
            "reward": fmean(rollout.reward for rollout in rollouts),
            "groups_active": advantages.active_groups,
            "groups_zero_variance": advantages.zero_variance_groups,
            **getattr(rollout_samples[0], "generation", {}),
            **policy_metrics(rollouts),
            "samples": len(self.samples),
            "trained_tokens": sum(sample.trained_tokens for sample in self.samples),
            "pads": -len(self.samples) % ranks(self.args),
        }
        return self.samples

    def make_experience_batch(self, rollout_samples: Sequence[Experience]) -> list[Experience]:
        """The Experiences of the samples that `prepare` made, in batches as the actors compute them."""
        rows = [sample_experience(sample, self._rewards[sample.key[:2]]) for sample in self.samples]
        shortest = min(rows, key=lambda row: row.total_length.item())
        rows += [pad_experience(shortest) for _ in range(self.stats["pads"])]
        # By place in `rows`, which is what the parent class puts into `Experience.index`.
        self._advantages = torch.tensor([sample.advantage for sample in self.samples] + [0.0] * self.stats["pads"])
        experiences: list[Experience] = super().make_experience_batch(rows)
        return experiences

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Gives each row the advantage of its rollout, on every trained token; KL, if any, is a part of the loss."""
        for experience in experiences:
            advantages = self._advantages[experience.index][:, None] * experience.action_mask
            experience.advantages, experience.returns = advantages, advantages.clone()
            experience.info["return"] = self._advantages[experience.index]
            experience.kl = None
        return experiences


def ranks(args: Any) -> int:
    """How many data-parallel ranks train."""
    gpus = args.actor.num_nodes * args.actor.num_gpus_per_node
    return int(gpus // args.ds.ring_attn_size // args.ds.tensor_parallel_size)


# ------------------------------------------------------------------------------------------------ one update of all samples


class ReplayBuffer(NaiveReplayBuffer):
    """One optimizer step over all samples, in micro-batches by length; remembers what was taken out to be trained on."""

    taken: list[str]

    def setup_dynamic_batch(self, strategy: Any) -> None:
        """Divides the samples into micro-batches, as if the sizes of rollouts and batch were those of the samples."""
        args, world = strategy.args, strategy.ds_device_mesh["dp"].size()
        count = len(self.items) * world
        told = SimpleNamespace(
            train=SimpleNamespace(**{**vars(args.train), "batch_size": count}),
            rollout=SimpleNamespace(**{**vars(args.rollout), "batch_size": count, "n_samples_per_prompt": 1}),
            ds=args.ds,
            actor=args.actor,
        )
        self.taken = []
        super().setup_dynamic_batch(
            SimpleNamespace(args=told, ds_device_mesh=strategy.ds_device_mesh, all_reduce=strategy.all_reduce)
        )

    def __getitem__(self, index: int) -> Any:
        items = super().__getitem__(index)
        self.taken += [item.labels[0] for item in items]
        return items


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

        OpenRLHF tells DeepSpeed that every micro-batch is an update's last. Stage 3 adds up all the same; stage 2 keeps a part of
        the gradient alone, with no error (a norm of 0.23 for 0.42 in our test of three micro-batches).
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
        self.run = running()
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
        self.tensorboard_logger.cut(states["global_step"])
        return states

    def train_step(self: Any, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        self._step = global_step + 1
        group_starts = rollout_samples[:: self.run.group_size]
        self.tensorboard_logger.places = sorted(Prompt.of(start.prompts[0]).place for start in group_starts)
        samples = self.experience_maker.prepare(rollout_samples)
        if not samples:  # every group is flat: the gradient would be zero
            return {**zero_variance_stats(self.experience_maker.stats), "policy_loss": 0.0}, self._step
        status, step = super().train_step(rollout_samples, global_step)  # type: ignore[misc]
        group = self.actor_model_group
        labels = ray.get(group.async_run_method("trained_labels"))[:: group.duplicate_actors]
        check_all_trained(samples, trained_keys(itertools.chain.from_iterable(labels)))
        return status, step

    def _compute_rollout_stats(self: Any, experiences: list[Experience]) -> dict[str, Any]:
        return zero_variance_stats(self.experience_maker.stats)

    def save_best_checkpoint(
        self: Any, eval_metrics: dict[str, Any], global_step: int, client_states: dict[str, Any] | None = None
    ) -> None:
        """Exports the model whenever it is the best so far: what `atommem eval` and `vllm serve` take as it is."""
        found = eval_metrics.get("eval_held_out_pass1")
        self._latest_eval_metric_value = found
        if found is not None and found > self.best_eval_metric_value:
            self.best_eval_metric_value = found
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
    if (found := version("openrlhf")) != VERSION:
        raise SettingError(
            f"This trainer is written for OpenRLHF {VERSION}, and {found} is installed: pip install openrlhf=={VERSION}"
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


# ------------------------------------------------------------------------------------------------------------- what is logged


class MetricsLogger:
    """Writes `metrics.jsonl` under the names of `train.grpo`, and hands everything on to TensorBoard."""

    def __init__(self, path: Path, tensorboard: Any) -> None:
        self.path, self.tensorboard = path, tensorboard
        self.places: list[
            int
        ] = []  # of the prompts of the step: a resumed run can be seen to lose none and repeat none

    def cut(self, step: int) -> None:
        """Forgets what was logged after the checkpoint that a run goes on from: it will be logged again."""
        kept = [line for line in read_jsonl(self.path) if line["step"] <= step]
        write_atomic(self.path, "".join(map(to_jsonl, kept)))

    def log_train(self, step: int, status: dict[str, Any]) -> None:
        """The numbers of an update, and of the rollouts that it was made on."""
        line: dict[str, Any] = {"step": step, "places": self.places}
        for name, value in status.items():
            if name.startswith(_ROLLOUT):
                *outer, inner = name.removeprefix(_ROLLOUT).split("/")
                place = line.setdefault(outer[0], {}) if outer else line
                place[inner] = round(value, 6)
            elif name in _NAMES:
                line[_NAMES[name]] = float(value)
        self._keep(line)
        self.tensorboard.log_train(step, status)

    def log_eval(self, step: int, status: dict[str, Any]) -> None:
        """Exact match on the held-out episodes; its interval is that of a share, at most as wide for one that is a mean."""
        em, episodes = status["eval_held_out_pass1"], int(status["eval_num_samples"])
        margin = 1.96 * math.sqrt(em * (1 - em) / episodes)
        interval = [round(max(em - margin, 0), 4), round(min(em + margin, 1), 4)]
        self._keep({"step": step, "eval_em": round(em, 4), "eval_em_ci95": interval, "eval_episodes": episodes})
        self.tensorboard.log_eval(step, status)

    def close(self) -> None:
        """Closes TensorBoard's files."""
        self.tensorboard.close()

    def _keep(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(to_jsonl(line))


def trained_keys(labels: Iterable[str]) -> list[SampleKey]:
    """The keys of the samples that were trained on, pads left out.

    >>> trained_keys(["[0, 1, 2]", ""])
    [(0, 1, 2)]
    """
    return [tuple(json.loads(label)) for label in labels if label != _PAD]


def zero_variance_stats(stats: dict[str, Any]) -> dict[str, float]:
    """A step's numbers under names for TensorBoard and wandb.

    >>> zero_variance_stats({"turns": 3.0, "operations": {"create": 0.5}})
    {'rollout/turns': 3.0, 'rollout/operations/create': 0.5}
    """
    flat: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, dict):
            flat |= {f"{_ROLLOUT}{name}/{inner}": number for inner, number in value.items()}
        else:
            flat[_ROLLOUT + name] = value
    return flat
