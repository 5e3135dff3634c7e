"""The command `atommem`. A subcommand's module is imported when it is called, so that help is quick."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from atommem_env.errors import AtomMemError, ShadowedPackage

# command → ("module:function", what it does). The only place where this package names those above it.
COMMANDS = {
    "eval": ("eval.run:main", "Evaluate a policy, or by a recipe many on many environments: tables, every number."),
    "compare": (
        "eval.compare:main",
        "Compare two runs on the same episodes: which questions were won, and whether by chance.",
    ),
    "judge": ("eval.judge:main", "Let a language model pass or fail the answers of a run, beside exact match."),
    "report": (
        "eval.report.report:main",
        "Turn runs into tables (Markdown, CSV, LaTeX) and plots, beside published figures.",
    ),
    "grpo": ("train.grpo:main", "Train a model by reinforcement learning, on this machine."),
    "sft": ("train.sft:main", "Fine-tune a chat model on collected samples."),
    "collect": ("train.collect:main", "Collect a policy's trajectories, as prompts and completions to train on."),
    "play": ("agents.play:main", "Be the policy yourself, in the terminal."),
    "policies": ("agents.play:list_policies", "List the policies that are known by name."),
    "trace": ("eval.viewer.trace:main", "Write an episode, or a run, as a page to open in a browser."),
    "quickstart": (
        "train.quickstart:main",
        "Train a small policy by SFT, then GRPO, and see what it gains; needs no data.",
    ),
    "train cluster": (
        "train.cluster.launch:main",
        "Train on one or many GPU machines, by OpenRLHF, DeepSpeed, vLLM and Ray.",
    ),
    "train cluster-sft": ("train.cluster.sft:main", "Fine-tune on collected samples on many GPUs, by OpenRLHF."),
    "data get": (
        "atommem_env.tasks.catalogue_commands:get_command",
        "Download a dataset's published file and import it.",
    ),
    "data import": ("atommem_env.tasks.catalogue_commands:import_command", "Make a dataset's file known to gym.make."),
    "data list": ("atommem_env.tasks.catalogue_commands:list_command", "Show which datasets were imported."),
    "data verify": ("atommem_env.tasks.catalogue_commands:verify_command", "Check imported data against their hashes."),
    "memory ls": ("atommem_env.store.commands:ls_command", "List the episodes that a memory store keeps."),
    "memory show": ("atommem_env.store.commands:show_command", "Show what an episode did to its memory, and kept."),
    "memory at-step": ("atommem_env.store.commands:at_step_command", "Show an episode's memory as of any reply."),
    "memory search": ("atommem_env.store.commands:search_command", "Search what episodes kept, one or all."),
    "memory export": (
        "atommem_env.store.commands:export_command",
        "Write what a store keeps as JSON lines or Parquet.",
    ),
    "models get": ("agents.models.download:get_command", "Fetch a model's weights and make them ready."),
}
_OURS = ("agents", "eval", "train")
# those whose options can come from a file: what parses their words and calls their function
_PARSERS = dict.fromkeys(("collect", "sft", "grpo"), "train.recipes:call") | {
    "eval": "eval.recipe:call",
    "train cluster": "train.cluster.launch:call",
}

_EXAMPLES = """\
examples:
  atommem quickstart
  atommem play AtomMem-Synthetic
  atommem eval AtomMem-Synthetic --policy oracle --episodes 100 --out runs/oracle
  atommem data import hotpotqa hotpot_dev_distractor_v1.json --split dev
  atommem eval AtomMem-HotpotQA --num-docs 200 --policy my_module:policy --out runs/mine
  atommem eval quick.toml --out runs/quick

`atommem COMMAND --help` explains a command's options."""


def main() -> None:
    """Entry point of the command `atommem`."""
    words = sys.argv[1:]
    command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if command not in COMMANDS:
        asked_for_help = not words or words[0] in ("-h", "--help")
        print(overview() if asked_for_help else f"atommem: no command {words[0]!r}{_meant(words[0])}\n\n{overview()}")
        sys.exit(0 if asked_for_help else 2)
    import tyro

    try:
        function, rest = load(COMMANDS[command][0]), words[len(command.split()) :]
        if command in _PARSERS:
            load(_PARSERS[command])(command, function, rest)
        else:
            tyro.cli(function, prog=f"atommem {command}", args=rest, config=(tyro.conf.OmitArgPrefixes,))
    except AtomMemError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"atommem {command}: {error}{notes}", file=sys.stderr)
        sys.exit(1)


def _meant(word: str) -> str:
    near = difflib.get_close_matches(word, {name.split()[0] for name in COMMANDS}, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def overview() -> str:
    """The text of `atommem --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}} {purpose}" for command, (_, purpose) in COMMANDS.items()]
    head = [
        "usage: atommem COMMAND …",
        "",
        "Agents that manage their own memory: environment, policies, evaluation.",
        "",
    ]
    return "\n".join([*head, "commands:", *lines, "", _EXAMPLES])


def load(target: str) -> Any:
    """The object that "module:attribute" names.

    Raises:
        ShadowedPackage: another distribution's package stands where ours should.
    """
    module, _, attribute = target.partition(":")
    package = module.partition(".")[0]
    if package in _OURS:
        _check_not_shadowed(package)
    return getattr(importlib.import_module(module), attribute)


def _check_not_shadowed(package: str) -> None:
    found = importlib.import_module(package)
    ours = Path(__file__).resolve().parents[1] / package
    where = Path(found.__file__ or next(iter(found.__path__), "")).resolve()
    if where.parent != ours and where != ours:
        owners = importlib.metadata.packages_distributions().get(package, [])
        culprits = sorted(set(owners) - {"atommem"}) or ["a folder on sys.path"]
        raise ShadowedPackage(
            f"The package {package!r} of {', '.join(culprits)} ({where}) hides ours ({ours}). "
            f"Uninstall it, or use a virtual environment of its own for atommem."
        )
