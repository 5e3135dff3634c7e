"""The checker that users run on their own policies; those of other parts are in `atommem_env.testing`."""

from __future__ import annotations

import asyncio
from typing import Any

import gymnasium as gym

from agents.chat_policy import GREEDY, Sampling
from agents.event_loop import run_blocking
from agents.policy import begin_episode, reply_to
from agents.registry import load_policy
from atommem_env.dialects import Dialect, get_dialect
from atommem_env.embedders import embed
from atommem_env.episode import Episode
from atommem_env.testing import describe_errors, require
from atommem_env.types import Operation, OperationKind


def check_policy(
    policy: Any,
    env_id: str = "AtomMem-Synthetic",
    *,
    model: Any = None,
    sampling: Sampling = GREEDY,
    layout: str = "shared_prefix",
    deterministic: bool = True,
    **options: Any,
) -> None:
    """Checks a policy, all that `agents.load_policy` takes, by five episodes of an environment.

    - It replies with a `str` or a `Reply` to every observation, in both phases.
    - It copes with observations that its own replies did not lead to: nothing stored or retrieved, and faults in every notice.
    - It plays several episodes at the same time. The same seed gives the same replies, whatever else it plays.

    Args:
        policy, model, sampling, layout: as for `agents.load_policy`.
        env_id: what to play; the policy may need one with tasks of its kind.
        deterministic: whether the same seed gives the same replies. A model whose batches change its last bits may not.
        options: of the environment, as for `gym.make`.

    Raises:
        AssertionError: it does not; the message says how.
    """
    env = gym.make(env_id, **{"durability": "off", **options})
    settings = env.unwrapped.settings  # type: ignore[attr-defined]

    async def play_all() -> None:
        seeds = (0, 1)
        first = [await _play(player, env.unwrapped, seed) for seed in seeds]
        again = await asyncio.gather(*(_play(player, env.unwrapped, seed) for seed in seeds))
        for seed, one, other in zip(seeds, first, again, strict=True):
            differ = next((step for step, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            require(
                not deterministic or one == other,
                f"The same seed must give the same replies: with seed {seed}, played again beside another episode, reply "
                f"{differ} differs. What belongs to an episode lives in what begin() returns, and what is random is drawn "
                "from its seed; or pass deterministic=False.",
            )
        await _play(player, env.unwrapped, 2, instead=_faults(get_dialect(settings.dialect)))

    try:
        with describe_errors("Taking it as a policy"):
            player = load_policy(policy, settings, sampling, layout, model=model)
        require(isinstance(player.name, str) and bool(player.name), f"name must be a text, got {player.name!r}.")
        require(isinstance(player.privileged, bool), f"privileged must be True or False, got {player.privileged!r}.")
        run_blocking(play_all())
    finally:
        env.close()


def _faults(dialect: Dialect) -> str:
    """A reply that is full of faults, and reads a memory that stays empty."""
    operations = [
        Operation(OperationKind.UPDATE, "Ada moved.", "m999"),
        Operation(OperationKind.DELETE, target="m999"),
        Operation(OperationKind.CREATE, ""),
        Operation(OperationKind.READ, "what was never stored"),
    ]
    last = dialect.write(Operation(OperationKind.CREATE, "This was cut"))
    return "".join(map(dialect.write, operations)) + "\x00\ud800" + last[: len(last) * 2 // 3]


async def _play(player: Any, env: Any, seed: int, *, instead: str | None = None) -> list[str]:
    """The replies of an episode in which the policy's reply, or `instead` of each, is carried out."""
    task = env.source.task(seed % len(env.source), seed)
    episode = Episode(task, env.settings, seed)
    with describe_errors(f"begin({seed}, …)"):
        act = begin_episode(player, seed, task)
    replies = []
    while episode.stop_reason is None:
        observation = episode.observe()
        where = f"the reply to step {observation['step']} (phase {observation['phase']!r}, seed {seed})"
        with describe_errors(f"Asking for {where}"):
            reply = await reply_to(act, observation)
        replies.append(reply.text)
        episode.resolve(embed(env.embedder, episode.submit(reply.text if instead is None else instead)))
        await asyncio.sleep(0)  # another episode's turn
    return replies
