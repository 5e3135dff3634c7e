"""What there is to do in an evaluation, before it is played: its configuration checked, its length estimated, without models."""

from __future__ import annotations

from dataclasses import dataclass

from agents.baselines.sanity import Constant
from agents.event_loop import run_blocking
from agents.registry import check_policy_name
from agents.rollout import Driver, episode_specs
from atommem_env.embedders import check_embedder_name
from atommem_env.env import split_options
from atommem_env.errors import SettingError
from atommem_env.make import find_spec
from atommem_env.prompts import get_layout
from atommem_env.tasks import Source
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings
from eval.options import EnvConfig, PlayConfig

# Options that change neither how many replies an episode takes nor what is read while the memory is empty.
_NO_PART = ("capacity", "durability", "embedder", "memory_tokens", "retrieval", "reward", "top_k")

NOTE = (
    "Replies: one for each chunk and each question of a first episode. Tokens: what the policy is shown, in its layout, without "
    "what a memory adds; a method reads less where it asks its model about the questions alone."
)


def environment_of(config: EnvConfig) -> tuple[Source, EpisodeSettings, dict[str, object]]:
    """Source, settings and source options of a run's environment, which is not made: it needs no data.

    Raises:
        SettingError: an option that the environment does not have.
    """
    options = {**find_spec(config.env_id).kwargs, **config.env_options()}
    options = {name: value for name, value in options.items() if name not in ("embedder", "store", "durability")}
    source = options.pop("source", None)
    return source, *split_options(source, options)


def check_config(config: PlayConfig) -> None:
    """Checks what shows without data, models and services: names and settings.

    Raises:
        AtomMemError: there is no such environment, policy, embedder or layout, or a setting that it does not have.
    """
    if config.episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {config.episodes}.")
    check_policy_name(config.policy)
    get_layout(config.layout)
    environment_of(config)
    embedder = {**find_spec(config.env_id).kwargs, **config.env_options()}.get("embedder")
    if isinstance(embedder, str):
        check_embedder_name(embedder)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the policy has to do."""

    replies: int
    tokens: (
        int  # of the observations in the run's layout, as the environment counts them; what a memory adds is left out
    )

    def times(self, count: int) -> Workload:
        """That of so many episodes."""
        return Workload(self.replies * count, self.tokens * count)


def episode_workload(config: PlayConfig) -> Workload:
    """An episode's workload: that of the first one, played by a policy that stores nothing and answers each question at once.

    Raises:
        AtomMemError: the environment cannot be made; its data are missing, for example.
    """
    env = config.make_env(embedder="hashing", durability="off")
    try:
        driver, layout = Driver.of(env), get_layout(config.layout)
        (spec,) = episode_specs(len(driver.source), 1, config.seed)
        turns = run_blocking(driver.play(spec, Constant(env.settings))).turns
    finally:
        env.close()
    count = get_tokenizer(env.settings.tokenizer).count
    prompts = (layout(turn.observation, env.settings) for turn in turns)
    return Workload(len(turns), sum(count(message["content"]) for prompt in prompts for message in prompt))


class Workloads:
    """Episodes' workloads, each computed once for runs that are alike in what it follows from."""

    def __init__(self) -> None:
        self._computed: dict[str, Workload] = {}

    def of(self, config: PlayConfig) -> Workload:
        """See `episode_workload`."""
        options = {name: value for name, value in config.env_options().items() if name not in _NO_PART}
        key = repr((config.env_id, sorted(options.items(), key=str), config.layout))
        if key not in self._computed:
            self._computed[key] = episode_workload(config)
        return self._computed[key]
