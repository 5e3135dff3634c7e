"""No memory: the question alone, and what the model's weights know.

Closed-book question answering (Roberts, Raffel and Shazeer, "How Much Knowledge Can You Pack Into the Parameters of a Language
Model?", arXiv 2002.08910), here by a prompt, without training on questions. It shows how many questions need no document.
"""

from __future__ import annotations

from agents.baselines.answering import answer, check_settings
from agents.policy import Act
from agents.prompting import Ask, render_reply
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase


def no_memory(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: reads nothing, asks the model once a question."""
    check_settings("no-memory", settings)

    async def act(observation: Observation) -> str:
        if observation["phase"] == Phase.READ:
            return ""
        said = await answer(ask, settings, observation["question"])
        return render_reply(settings, Operation(OperationKind.ANSWER, said)) if said else ""

    return act
