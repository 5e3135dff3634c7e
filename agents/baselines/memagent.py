"""MemAgent: one memory, which the model rewrites with every chunk.

Yu et al., "MemAgent: Reshaping Long-Context LLM with Multi-Conv RL-based Memory Agent" (arXiv 2507.02259). The memory is the
scratchpad of the environment; there are no entries. Different here:

- The model is untrained, while MemAgent is trained by reinforcement learning (multi-conversation DAPO). A model trained on the
  prompts of its authors may do less well on these, which are our own.
- All questions of the task are shown with each chunk; MemAgent has one question.
- The memory is as long as `max_new_tokens` and `scratchpad_tokens` let it be, a chunk as long as `chunk_tokens`; MemAgent has
  1,024 and 5,000 tokens.
- A reply without text leaves the memory as it was.
"""

from __future__ import annotations

from agents.baselines.answering import answer, check_settings
from agents.policy import Act
from agents.prompting import Ask, render_reply
from atommem_env.types import EpisodeSettings, Message, Observation, Operation, OperationKind, Phase

_UPDATE = """\
You read a document piece by piece to answer a question at its end. Your memory is all that you will have then.

Question: {questions}

Memory so far:
{memory}

Next piece of the document:
{chunk}

Write the new memory: what helped so far, and what in this piece helps to answer the question. Write only the memory."""


def memagent(settings: EpisodeSettings, ask: Ask) -> Act:
    """A `Method`: asks the model once a chunk and once a question."""
    check_settings("memagent", settings, scratchpad=True)

    async def act(observation: Observation) -> str:
        memory = observation["scratchpad"]
        if observation["phase"] == Phase.READ:
            prompt = _UPDATE.format(
                questions=observation["questions"], memory=memory or "(empty)", chunk=observation["chunk"]
            )
            text = (await ask([Message(role="user", content=prompt)])).text
            kind = OperationKind.SCRATCHPAD
        else:
            text = await answer(ask, settings, observation["question"], memory)
            kind = OperationKind.ANSWER
        return render_reply(settings, Operation(kind, text)) if text.strip() else ""

    return act
