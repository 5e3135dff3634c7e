"""One dial: `atommem collect | sft | grpo --recipe NAME` sets every option that the command line does not give.

A recipe is a TOML file, `configs/train/NAME.toml` or one of your own, and complete: from an empty folder its three commands,
one after the other, make the model. Its tables:

    [env]                       the environment, of collect and grpo: fields of `eval.options.EnvConfig`
    [collect] [sft] [grpo]      fields of `CollectConfig`, `SFTConfig` and `LocalGRPOConfig`
    [model]                     the model's `config.json` as far as its size follows from it; with it a run that cannot fit
                                is rejected before anyone has fetched the weights

How a recipe is based on another one: `eval.toml_tables`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from agents.models.find import find_model
from atommem_env.errors import ModelNotFound, SettingError
from eval.command_line import parse_config, take_option
from eval.options import EnvConfig
from eval.toml_tables import fields_of, read_recipe_file, read_table
from train.collect import CollectConfig
from train.estimate import check_memory
from train.settings import LocalGRPOConfig, SFTConfig

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "train"
NAMES = ("tiny", "smollm2", "qwen3-0.6b", "qwen3-8b-lora")  # from the smallest machine to the largest
_Config = TypeVar("_Config", CollectConfig, SFTConfig, LocalGRPOConfig)
_COMMANDS: dict[str, type[Any]] = {"collect": CollectConfig, "sft": SFTConfig, "grpo": LocalGRPOConfig}
_MODEL_FIELDS = {
    "model_type": str,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "tie_word_embeddings": bool,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A saved configuration of the training commands."""

    configs: dict[type, Any]  # of each command; a field that is required and not named is tyro.MISSING
    model: dict[str, Any]  # of a `config.json`; {}: the file has no [model]


def load_recipe(name: str, made: type[_Config]) -> _Config:
    """The configuration of one command in a recipe.

    Raises:
        SettingError: as in `read_recipe`.
    """
    config: _Config = read_recipe(name).configs[made]
    return config


def read_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one in that TOML file.

    Raises:
        SettingError: as in `read_recipe_file`, or something in a file is not as it must be.
    """
    file = read_recipe_file(name, FOLDER)
    tables = file.tables
    known = ("env", *_COMMANDS, "model")
    for table, values in tables.items():
        if table not in known or not isinstance(values, dict):
            raise SettingError(f"{file}: there is no table [{table}]. There are: {', '.join(known)}.")
    env = read_table(file, "env", tables.get("env", {}), fields_of(EnvConfig))
    configs: dict[type, Any] = {}
    for command, made in _COMMANDS.items():
        fields = fields_of(made)
        recorded = {"recipe": file.name} if fields.pop("recipe", None) else {}
        own = read_table(file, command, tables.get(command, {}), fields)
        shared = env if issubclass(made, EnvConfig) else {}
        missing = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(made)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        try:
            configs[made] = made(**missing | shared | own | recorded)
        except SettingError as error:
            error.add_note(f"in {file}, [{command}]")
            raise
    model = read_table(file, "model", tables.get("model", {}), _MODEL_FIELDS)
    if model and len(model) < len(_MODEL_FIELDS):
        raise SettingError(f"{file}: [model] must have all of {', '.join(_MODEL_FIELDS)}; it has {', '.join(model)}.")
    return Recipe(configs, model)


def call(command: str, function: Callable[[Any], None], words: Sequence[str]) -> None:
    """Runs a training command with its arguments, those of the command line before those of `--recipe`.

    Raises:
        SettingError: as in `read_recipe`, or the recipe's model, not on this machine yet, cannot fit.
    """
    prog = f"atommem {command}"
    name, words = take_option(prog, words, "--recipe", "--preset")  # --preset: as earlier versions called it
    made = _COMMANDS[command]
    description = (
        f"{inspect.getdoc(function)}\n\n"
        f"--recipe NAME sets every option that is not given:\n{', '.join(NAMES)}, or a TOML file of yours."
    )
    if issubclass(made, EnvConfig):
        description += "\nWhat --set names is added to the recipe's."
    if name is None:
        function(parse_config(made, prog, description, words))
        return
    recipe = read_recipe(name)
    default = recipe.configs[made]
    config = parse_config(made, prog, description, words, default)
    if isinstance(config, SFTConfig | LocalGRPOConfig) and recipe.model and config.model == default.model:
        try:
            find_model(config.model)
        except ModelNotFound:
            check_memory(config, recipe.model)  # first: nobody shall fetch what cannot run here
    function(config)
