"""Commands whose options have defaults from elsewhere: a recipe, another run (`--like`), the folder of a trained model.

An option that decides what the defaults of the others are is read first (`take_option`); then the whole command line is parsed
over these defaults (`parse_config`), so that what is given there comes first, and `--help` shows what holds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from eval.options import EnvConfig, EvalConfig
from eval.played_as import PlayRecord, read_card, read_run, set_text
from eval.run_folder import require_trusted

_Config = TypeVar("_Config")
_OF_THE_MODEL = ("layout", "dialect", "max_new_tokens")
_OF_THE_RUN = ("seed", "episodes")
_LIKE = """\
--like RUN takes the settings of another run for all that is not given here: environment, layout, sampling, seed and episodes.
The folder of a trained model as --policy does so too, by its atommem.json: ENV_ID can then be left out.
What --set names is added to theirs."""


def take_option(prog: str, words: Sequence[str], *flags: str) -> tuple[str | None, list[str]]:
    """The value of an option, and the other words.

    >>> take_option("atommem grpo", ["--steps", "3", "--recipe=tiny"], "--recipe", "--preset")
    ('tiny', ['--steps', '3'])
    """
    option = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    option.add_argument(*flags, dest="value")
    given, rest = option.parse_known_args(words)
    return given.value, rest


def parse_config(
    made: type[_Config], prog: str, description: str, words: Sequence[str], default: _Config | None = None
) -> _Config:
    """The configuration that a command line asks for; what `--set` names is added to the default's.

    Args:
        default: the values of fields that are not given; one that must be given is tyro.MISSING. None: those of the class.
    """
    config: Any = tyro.cli(
        made,
        prog=prog,
        description=description,
        args=words,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if isinstance(config, EnvConfig) and isinstance(default, EnvConfig) and config.set != default.set:
        joined = (*default.set, *config.set)  # of two values the later one counts
        config = dataclasses.replace(config, set=joined)
    parsed: _Config = config
    return parsed


def parse_eval(prog: str, description: str, words: Sequence[str]) -> tuple[EvalConfig, list[str]]:
    """The evaluation that a command line asks for, and lines that say which of it comes from elsewhere.

    With `--like` the environment is the other run's; of a trained model's `atommem.json` then holds what the model keeps in any
    environment: layout, dialect and the length of a reply. So it is, for either, where ENV_ID names another environment.

    Raises:
        SettingError: the other run, or `atommem.json`, cannot be read, or names modules that are not trusted.
    """
    description = f"{description}\n\n{_LIKE}"
    run, words = take_option(prog, words, "--like")
    policy, _ = take_option(prog, words, "--policy")
    like, card = read_run(Path(run)) if run else None, read_card(policy) if policy else None
    if not (like or card):
        return parse_config(EvalConfig, prog, description, words), []
    for record in filter(None, (like, card)):
        require_trusted(record.values, record.path, trust="--trust" in words)
    default = EvalConfig(**default_fields(like, card))
    config = parse_config(EvalConfig, prog, description, words, default)
    if config.env_id != default.env_id:
        default = EvalConfig(**default_fields(like, card, config.env_id))
        config = parse_config(EvalConfig, prog, description, words, default)
    return config, _notes(config, default, like, card)


def default_fields(like: PlayRecord | None, card: PlayRecord | None, env_id: str | None = None) -> dict[str, Any]:
    """The defaults of an evaluation, as fields of `EvalConfig`.

    Args:
        like: of another run.
        card: of the model that plays.
        env_id: the environment that was given; None: the recorded one.
    """
    record = like or card
    assert record is not None
    recorded = env_id in (None, record.env_id)
    fields = record.playing() | (record.environment() if recorded else {"env_id": env_id})
    if card and not (record is card and recorded):
        fields |= card.model()
    return fields


def _notes(config: EvalConfig, default: EvalConfig, like: PlayRecord | None, card: PlayRecord | None) -> list[str]:
    """What of an evaluation comes from another run, and what from the folder of the model."""

    def left_out(record: PlayRecord) -> str:
        return "" if record.env_id == config.env_id else f"; the options of {record.env_id} are left out"

    notes = []
    if like:
        taken = _taken(config, default, environment=like.env_id == config.env_id, model=not card, run=True)
        notes.append(f"As in {like.path.parent}: {taken}{left_out(like)}.")
    if card:
        recorded = card.env_id == config.env_id and not like
        taken = _taken(config, default, environment=recorded, model=True, run=False)
        notes.append(f"{config.policy} plays as it was trained: {taken}{left_out(card)}; from {card.path}.")
    return notes


def _taken(config: EvalConfig, default: EvalConfig, *, environment: bool, model: bool, run: bool) -> str:
    """The settings that are the default's, and those that are not, in words: of the environment, the model and the run."""
    now, before = _settings(config), _settings(default)
    wanted = dict.fromkeys(_OF_THE_MODEL, model) | dict.fromkeys(_OF_THE_RUN, run)
    names = [name for name in now if wanted.get(name, environment)]
    changed = [now[name] for name in names if before.get(name) != now[name]]
    but = f"; but {', '.join(changed)}" if changed else ""
    return ", ".join(now[name] for name in names if before.get(name) == now[name]) + but


def _settings(config: EvalConfig) -> dict[str, str]:
    """The settings of an evaluation in words, by name."""
    options = {name: value for name, value in config.env_options().items() if name != "durability"}
    return {
        "env_id": config.env_id,
        "layout": f"layout {config.layout}",
        "max_new_tokens": f"at most {config.max_new_tokens} tokens a reply",
        **{name: f"{name}={value if isinstance(value, str) else set_text(value)}" for name, value in options.items()},
        "seed": f"seed {config.seed}",
        "episodes": f"{config.episodes} episodes",
    }
