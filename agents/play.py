"""A person as the policy, in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agents.models.load import MODELS
from agents.registry import METHODS, POLICIES
from agents.rollout import play_episode
from atommem_env.dialects import Dialect, get_dialect
from atommem_env.make import make_env
from atommem_env.types import Observation, Operation, OperationKind

_SHORT = {
    "c": OperationKind.CREATE,
    "r": OperationKind.READ,
    "u": OperationKind.UPDATE,
    "d": OperationKind.DELETE,
    "p": OperationKind.SCRATCHPAD,
    "a": OperationKind.ANSWER,
}
_HELP = """\
c TEXT     create an entry
r TEXT     read: search the memory; the matches are shown from the next step on
u ID TEXT  update an entry
d ID       delete an entry
p TEXT     rewrite the scratchpad
a TEXT     answer the question
One operation a line; an empty line sends the reply. q leaves.
Anything else is sent as it is."""


def expand(line: str, dialect: Dialect) -> str:
    """A line as typed, its short form written out in the dialect.

    >>> expand("u m3 Ada moved to Rome.", get_dialect("tags"))
    '<update_memory>m3: Ada moved to Rome.</update_memory>'
    """
    letter, _, rest = line.strip().partition(" ")
    if letter not in _SHORT or not rest:
        return line
    kind = _SHORT[letter]
    if kind is OperationKind.DELETE:
        return dialect.write(Operation(kind, target=rest.strip()))
    if kind is OperationKind.UPDATE:
        target, _, text = rest.strip().partition(" ")
        return dialect.write(Operation(kind, text, target))
    return dialect.write(Operation(kind, rest))


class _Left(Exception):
    """The person left before the end of the episode."""


def main(
    env_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")] = "AtomMem-Synthetic",
    /,
    *,
    seed: int = 0,
    num_docs: int | None = None,
    questions: int | None = None,
) -> None:
    """Be the policy yourself: read, keep what matters, answer.

    Args:
        env_id: Environment.
        seed: Selects the task.
        num_docs: Documents in the context; the environment's default where left out.
        questions: Questions of the task; the environment's default where left out.
    """
    console = Console()
    options: dict[str, Any] = {"num_docs": num_docs, "questions": questions}
    env = make_env(env_id, **{name: value for name, value in options.items() if value is not None})
    dialect = get_dialect(env.settings.dialect)
    console.print(Panel(_HELP, title="how to play"))

    def person(observation: Observation) -> str:
        for name, value in observation.items():
            if value != "" and name not in ("phase", "step", "steps_left"):
                console.print(Panel(Text(str(value)), title=name, title_align="left"))
        console.print(f"step {observation['step'] + 1}, {observation['steps_left']} left ({observation['phase']})")
        lines: list[str] = []
        while True:
            try:
                line = console.input("[bold]> [/]")
            except EOFError:
                raise _Left from None
            if line.strip() == "q":
                raise _Left
            if not line.strip():
                return "\n".join(lines)
            lines.append(expand(line, dialect))

    try:
        rollout = play_episode(env, person, seed=seed)
    except _Left:
        console.print(f"You left; your entries are in {env.store.folder}.")
    else:
        for question, outcome in zip(env.episode.task.questions if env.episode else (), rollout.questions, strict=True):
            console.print(
                f"{question.text}  gold: [bold]{'; '.join(question.answers) or 'none'}[/]  yours: {outcome.prediction}"
            )
        graded = any(outcome.em is not None for outcome in rollout.questions)
        console.print(
            f"exact match: {rollout.reward:.2f}" if graded else "No question has a gold answer: nothing was graded."
        )
    finally:
        env.close()


def list_policies() -> None:
    """List the policies, methods and models that are known by name."""
    rules = {name: what for name, (_, what) in POLICIES.items()}
    methods = {name: what for name, (_, what) in METHODS.items()}
    console = Console()
    for title, caption, rows in (
        ("Rules: --policy NAME", "* is given the golds", rules),
        ("Methods: --policy METHOD@MODEL", "or module:attribute@MODEL, a method of yours", methods),
        ("Models as AtomMem agents: --policy MODEL", "or module:attribute, a policy of yours", MODELS),
    ):
        table = Table("name", "what it does", title=title, caption=caption, title_justify="left")
        for name, description in rows.items():
            table.add_row(name, description)
        console.print(table)
