"""The command `atommem`. A subcommand's module is imported when it is called, so that help is quick."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gymnasium.error import Error as GymnasiumError

from atommem_env.errors import AtomMemError, PluginError
from atommem_env.packages import PACKAGES, check_packages
from atommem_env.plugins import raised_at, suggest
from atommem_env.terminal import printable

_LAST_SECONDS = 3.0  # until an interrupted process ends, whatever still runs in it


class Command(NamedTuple):
    """A subcommand."""

    target: str  # "module:function"
    purpose: str
    example: str  # what follows its name


# The only place where this package names those above it.
COMMANDS = {
    "eval": Command(
        "eval.run:main",
        "Evaluate a policy, or by a recipe many on many environments: tables, every number.",
        "AtomMem-Synthetic --policy store-all --episodes 20 --set top_k=4 --out runs/store-all",
    ),
    "compare": Command(
        "eval.compare:main",
        "Compare two runs on the same episodes: which questions were won, and whether by chance.",
        "runs/oracle runs/store-all",
    ),
    "verify": Command(
        "eval.verify:main",
        "Check whether a run's data, weights, memory and numbers are still what they were.",
        "runs/oracle",
    ),
    "judge": Command(
        "eval.judge:main",
        "Let a language model pass or fail the answers of a run, beside exact match.",
        "runs/oracle --model openai:gpt-4o-mini",
    ),
    "report": Command(
        "eval.report.report:main",
        "Turn runs into tables (Markdown, CSV, LaTeX) and plots, beside published figures.",
        "runs/quick",
    ),
    "grpo": Command(
        "train.grpo:main",
        "Train a model by reinforcement learning, on this machine.",
        "--recipe tiny --model runs/sft/model --out runs/grpo",
    ),
    "sft": Command(
        "train.sft:main",
        "Fine-tune a chat model on collected samples.",
        "runs/samples --recipe tiny --out runs/sft",
    ),
    "collect": Command(
        "train.collect:main",
        "Collect a policy's trajectories, as prompts and completions to train on.",
        "--recipe tiny --episodes 300 --out runs/samples",
    ),
    "play": Command("agents.play:main", "Be the policy yourself, in the terminal.", "AtomMem-Synthetic --num-docs 8"),
    "policies": Command("agents.play:list_policies", "List the policies that are known by name.", ""),
    "settings": Command(
        "atommem_env.settings:settings_command",
        "List what can be set in an environment, with its defaults.",
        "AtomMem-HotpotQA",
    ),
    "trace": Command(
        "eval.viewer.trace:main",
        "Write an episode, or a run, as a page to open in a browser.",
        "runs/oracle --episode 3",
    ),
    "quickstart": Command(
        "train.quickstart:main",
        "Train a small policy by SFT, then GRPO, and see what it gains; needs no data.",
        "--out runs/quickstart",
    ),
    "train cluster": Command(
        "train.cluster.launch:main",
        "Train on one or many GPU machines, by OpenRLHF, DeepSpeed, vLLM and Ray.",
        "qwen3-8b-hotpotqa --dry-run",
    ),
    "train cluster-sft": Command(
        "train.cluster.sft:main",
        "Fine-tune on collected samples on many GPUs, by OpenRLHF.",
        "runs/samples --model Qwen/Qwen3-8B --out runs/sft",
    ),
    "data get": Command(
        "atommem_env.tasks.catalogue_commands:get_command",
        "Download a dataset's published file and import it.",
        "hotpotqa --split dev",
    ),
    "data import": Command(
        "atommem_env.tasks.catalogue_commands:import_command",
        "Make a dataset's file known to gym.make.",
        "hotpotqa hotpot_dev_distractor_v1.json --split dev",
    ),
    "data list": Command("atommem_env.tasks.catalogue_commands:list_command", "Show which datasets were imported.", ""),
    "data verify": Command(
        "atommem_env.tasks.catalogue_commands:verify_command",
        "Check imported data against their hashes.",
        "hotpotqa",
    ),
    "memory ls": Command(
        "atommem_env.store.commands:ls_command",
        "List the episodes in a memory store.",
        "runs/oracle/memory --last 10",
    ),
    "memory show": Command(
        "atommem_env.store.commands:show_command",
        "Show an episode's changes to its memory, and the entries at its end.",
        "runs/oracle/memory 3f2a",
    ),
    "memory at-step": Command(
        "atommem_env.store.commands:at_step_command",
        "Show an episode's memory as of any reply.",
        "runs/oracle/memory 3f2a 5",
    ),
    "memory search": Command(
        "atommem_env.store.commands:search_command",
        "Search the entries of all episodes, or of one.",
        "runs/oracle/memory 'Who lives in Rome?' --k 5",
    ),
    "memory export": Command(
        "atommem_env.store.commands:export_command",
        "Write the rows of a store as one file.",
        "runs/oracle/memory --out entries.parquet",
    ),
    "models get": Command(
        "agents.models.download:get_command", "Fetch a model's weights and make them ready.", "smollm2"
    ),
    "completion": Command(
        "atommem_env.completion:script_command",
        "Print the script by which bash, zsh or fish completes these commands.",
        "bash",
    ),
}
# those whose options can come from a file: what parses their words and calls their function
_PARSERS = dict.fromkeys(("collect", "sft", "grpo"), "train.recipes:call") | {
    "eval": "eval.recipe:call",
    "train cluster": "train.cluster.launch:call",
}
_RECIPES = Path(__file__).resolve().parents[1] / "configs"

_EXAMPLES = """\
examples:
  atommem quickstart
  atommem play AtomMem-Synthetic
  atommem eval AtomMem-Synthetic --policy oracle --episodes 100 --out runs/oracle
  atommem data import hotpotqa hotpot_dev_distractor_v1.json --split dev
  atommem eval AtomMem-HotpotQA --num-docs 200 --policy my_module:policy --out runs/mine
  atommem eval quick.toml --out runs/quick

`atommem COMMAND --help` explains a command's options, `atommem settings` what can be set in an environment;
`atommem completion --help` says how a shell completes all of them."""


def main() -> None:
    """Entry point of the command `atommem`.

    Exits with 1 after an error whose cause is outside this program, which is one line on stderr; with 2 where there is no such
    command; with 130 after an interrupt.
    """
    try:
        try:
            _run(sys.argv[1:])
        finally:
            sys.stdout.flush()  # while a closed pipe can still be handled
    except BrokenPipeError:
        # Who reads has seen enough (`atommem --help | head -1`). What is left in the buffers must go somewhere.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(1)


def _run(words: Sequence[str]) -> None:
    """Does what the words of a command line say."""
    match words:
        case [] | ["-h" | "--help", *_]:
            print(overview())
            return
        case ["-V" | "--version", *_]:
            print(f"atommem {_version()}")
            return
        case ["--complete", shell, _, *_]:
            print(*_complete(shell, words[2:]), sep="\n", end="")
            return
        case [group] | [group, "-h" | "--help", *_] if _subcommands(group):
            print(overview(group))
            return
    command = _command(words)
    if command is None:
        _reject(words)
    name = f"atommem {command}"
    rest = words[len(command.split()) :]
    try:
        _call(command, rest)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        _exit_within(_LAST_SECONDS, 130)
        sys.exit(130)
    except (AtomMemError, GymnasiumError, OSError) as error:
        print(f"{name}: {printable(_message(error))}", file=sys.stderr)
        sys.exit(1)


def _exit_within(seconds: float, code: int) -> None:
    """Ends the process after that time, if its own end still waits then for a thread that a policy or a client left behind."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def _command(words: Sequence[str]) -> str | None:
    """The command that the words begin with."""
    names = (" ".join(words[:count]) for count in (2, 1))
    return next((name for name in names if name in COMMANDS), None)


def _call(command: str, words: Sequence[str]) -> None:
    import tyro

    function = load(COMMANDS[command].target)
    try:
        if command in _PARSERS:
            load(_PARSERS[command])(command, function, words)
        else:
            tyro.cli(function, prog=f"atommem {command}", args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if end.code:
            raise
        if {"-h", "--help"} & set(words):
            print(f"\nexample:\n  atommem {command} {COMMANDS[command].example}".rstrip())
            raise
        if any(word.startswith("--tyro-") for word in words):
            raise
        # No command of ours ends so: a policy or another part of the user's did, and the command has not done its work.
        raise PluginError(f"ended early, by sys.exit({end.code}) ({raised_at(end)}).") from end


def _message(error: Exception) -> str:
    """An error in words, with its notes."""
    text = str(error)
    if not isinstance(error, AtomMemError):
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror + ("" if error.filename is None else f": {error.filename}")
        text = " ".join(text.split()) or type(error).__name__
    return printable(" ".join([text, *(f"({note})" for note in getattr(error, "__notes__", ()))]))


def _reject(words: Sequence[str]) -> NoReturn:
    group = words[0] if _subcommands(words[0]) else ""
    name, word = (f"atommem {group}", words[1]) if group else ("atommem", words[0])
    known = _subcommands(group) if group else [*(command.split()[0] for command in COMMANDS), *COMMANDS]
    print(f"{name}: no command {word!r}{suggest(word, known) or '.'}\n\n{overview(group)}", file=sys.stderr)
    sys.exit(2)


def _subcommands(group: str) -> list[str]:
    """Those of `data`, for example; [] where it is no group."""
    return [command.split()[1] for command in COMMANDS if command.startswith(f"{group} ")]


def overview(group: str = "") -> str:
    """The text of `atommem --help`, or of `atommem data` and the like."""
    commands = {name: command for name, command in COMMANDS.items() if name.startswith(f"{group} " if group else "")}
    width = max(map(len, commands))
    lines = [f"  {name:<{width}} {command.purpose}" for name, command in commands.items()]
    if group:
        return "\n".join([f"usage: atommem {group} COMMAND …", "", "commands:", *lines])
    about = "Agents that manage their own memory: environment, policies, evaluation."
    return "\n".join(["usage: atommem COMMAND …", "", about, "", "commands:", *lines, "", _EXAMPLES])


def _version() -> str:
    try:
        return importlib.metadata.version("atommem")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def load(target: str) -> Any:
    """The object that "module:attribute" names.

    Raises:
        ShadowedPackage: another package stands where one of ours should.
    """
    module, _, attribute = target.partition(":")
    package = module.partition(".")[0]
    if package in PACKAGES:
        check_packages(package)
    return getattr(importlib.import_module(module), attribute)


# ---------------------------------------------------------------------------------------------------------- completion


def _complete(shell: str, typed: Sequence[str]) -> list[str]:
    """What a shell offers for the last of the words after `atommem`."""
    from atommem_env.completion import candidates

    return candidates(shell, typed, COMMANDS, _help, _values)


def _help(command: str) -> str:
    """The text of its --help, without line breaks for a narrow terminal."""
    os.environ["COLUMNS"] = "1000"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _call(command, ["--help"])
    return text.getvalue()


def _values(command: str, argument: str, words: Sequence[str]) -> Iterator[str]:
    """The values of an option, or of an argument without a name, that are known.

    Args:
        argument: `--policy`, or the metavar ENV_ID, for example.
        words: of the command so far.
    """
    environments = [f"AtomMem-{name}" for name in load("atommem_env:ENVIRONMENTS")]
    match argument:
        case "ENV_ID" if command != "train cluster":  # whose recipe names it
            yield from environments
            if command == "eval":
                yield from (path.name for path in sorted((_RECIPES / "eval").glob("*.toml")))
        case "RECIPE" | "--recipe":
            folder = "cluster" if argument == "RECIPE" else "train"
            yield from (path.stem for path in sorted((_RECIPES / folder).glob("*.toml")))
        case "--policy":
            models = [name for name in load("agents.models.load:MODELS") if name.islower() and name.isalnum()]
            yield from (*load("agents.registry:POLICIES"), *models)
            yield from (f"{method}@{model}" for method in load("agents.registry:METHODS") for model in models)
        case "--model":
            yield from (name for name in load("agents.models.load:MODELS") if name.islower() and name.isalnum())
        case "--embedder":
            yield from ("hashing", "minilm")
        case "--layout":
            yield from ("shared_prefix", "terse")
        case "--dialect":
            yield from ("tags", "public_code", "tool_calls")
        case "--durability":
            yield from ("off", "episode", "step")
        case "--set":
            env_id = next((word for word in words if word in environments), environments[0])
            for settings in load("atommem_env.settings:settings_of")(env_id).values():
                yield from (f"{setting.name}=" for setting in settings)
