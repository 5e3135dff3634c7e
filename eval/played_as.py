"""How episodes were played, as a file says it: a run's `config.json`, or `atommem.json` in the folder of a trained model.

Training writes `atommem.json` beside the weights (`write_card`), so that a model is played as it was trained wherever its folder
goes; `atommem eval` takes its defaults from there, and from another run with `--like`:

    {
      "schema_version": 1,
      "env_id": "AtomMem-Synthetic",
      "options": {"embedder": "hashing", "num_docs": 6, …},     arguments of `gym.make`, with the task source's defaults
      "settings": {"dialect": "tags", "tokenizer": "builtin", …},         the `EpisodeSettings` that follow, in full
      "layout": "terse",
      "sampling": {"max_new_tokens": 64},
      "written_by": {"command": "atommem sft", "recipe": "tiny", "run": "sft"},
      "weights": "3fa1…", "versions": {"torch": "2.13.0", …}, "commit": "63013de…"                 see `eval.provenance`
    }
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atommem_env.env import AtomMemEnv
from atommem_env.errors import AtomMemError, SettingError
from atommem_env.make import find_spec, make_env
from atommem_env.plugins import name_of
from atommem_env.types import ABLATIONS, EpisodeSettings
from eval.options import EnvConfig
from eval.provenance import commit, hash_folder, versions
from eval.run_folder import Record, named_modules, read_config, write_atomic
from eval.toml_tables import fields_of, read_table

CARD = "atommem.json"
_SCHEMA_VERSION = 1  # of the card
_NOT_OPTIONS = ("env_id", "set", "layout", "temperature", "max_new_tokens", "in_flight")  # fields not of `gym.make`


def environment_record(env_id: str, env: AtomMemEnv, options: dict[str, Any], layout: object) -> Record:
    """What a record says of an environment, and of how a model is shown it, as plain data.

    Args:
        options: what `gym.make` was given beside the id.
    """
    record = {
        "env_id": env_id,
        "options": {**env.source_options, **options},  # defaults too, so that it stays the same when one changes
        "layout": name_of(layout),
        "settings": env.settings.record(),
    }
    plain: Record = json.loads(json.dumps(record, default=name_of))
    return plain


def record_of(config: EnvConfig) -> Record:
    """`environment_record` of the environment that a configuration describes; its embedder may be out of reach."""
    env = config.make_env(embedder="hashing", durability="off")
    env.close()
    return environment_record(config.env_id, env, config.env_options(), config.layout)


def write_card(
    model: Path,
    environment: Record,
    max_new_tokens: int,
    *,
    command: str,
    run: Path,
    recipe: str | None = None,
) -> None:
    """Writes `atommem.json` into the folder of a model.

    Args:
        environment: what the model was trained on, as from `record_of`. Which of its questions were trained on is left
            out: a model is played on the split `test`, or on the environment's own where there is no such split.
        max_new_tokens: of a reply.
        command, run, recipe: which training run wrote the model: its command, its folder (only the name is stored), its recipe.
    """
    embedder = inspect.signature(AtomMemEnv).parameters["embedder"].default
    options = {"embedder": embedder, **environment["options"]}
    options = {name: value for name, value in options.items() if name not in ("durability", "store")}
    if "split" in options:  # else the questions are the environment's own
        options.pop("data", None)
        del options["split"]
        options |= _unseen(environment["env_id"], options)
    card = {
        "schema_version": _SCHEMA_VERSION,
        "env_id": environment["env_id"],
        "options": options,
        "settings": environment["settings"],
        "layout": environment["layout"],
        "sampling": {"max_new_tokens": max_new_tokens},
        "written_by": {"command": command, "recipe": recipe, "run": run.resolve().name},
        "weights": hash_folder(model),
        "versions": versions(),
        "commit": commit(),
    }
    write_atomic(model / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def _unseen(env_id: str, options: dict[str, Any]) -> dict[str, str]:
    """The split `test` where the data of this machine has one: neither trained on, nor was the best model chosen by it."""
    split = {"split": "test"}
    try:
        make_env(env_id, **options | split | {"embedder": "hashing", "durability": "off"}).close()
    except AtomMemError:
        return {}
    return split


def eval_command(model: Path) -> str:
    """The command that evaluates a trained model; ENV_ID stands for what is not known of one without `atommem.json`."""
    card = read_record(model / CARD)
    env_id = [] if card else ["ENV_ID"]
    trust = ["--trust"] if card and named_modules(card.values) else []
    return shlex.join(["atommem", "eval", *env_id, "--policy", str(model), *trust])


@dataclass(frozen=True, slots=True)
class PlayRecord:
    """A file that says how episodes were played."""

    path: Path
    values: dict[str, Any]

    @property
    def env_id(self) -> str:
        """The environment."""
        env_id: str = self.values["env_id"]
        return env_id

    def environment(self) -> dict[str, Any]:
        """The environment, as fields of `EvalConfig`.

        Raises:
            SettingError: a value in the file is of another type than its field.
        """
        options, settings = self.values["options"], self.values["settings"]
        registered, ablation = find_spec(self.env_id).kwargs, ABLATIONS.get(options.get("ablation"), {})
        implied = json.loads(json.dumps({**EpisodeSettings().record(), **registered, **ablation}, default=name_of))
        since_changed = {  # defaults of this version that are others than those the record was written with
            name: value for name, value in settings.items() if name not in options and value != implied.get(name)
        }
        given = {name: value for name, value in {**options, **since_changed}.items() if value is not None}
        kinds = {name: kind for name, kind in fields_of(EnvConfig).items() if name not in _NOT_OPTIONS}
        own = {name: value for name, value in given.items() if name in kinds}
        others = tuple(f"{name}={set_text(value)}" for name, value in given.items() if name not in kinds)
        return {"env_id": self.env_id, **read_table(self.path, "options", own, kinds), "set": others}

    @property
    def layout(self) -> str:
        """How a language model is shown an observation."""
        layout: str = self.values["layout"]
        return layout

    @property
    def dialect(self) -> str:
        """How operations are written."""
        dialect: str = self.values["settings"]["dialect"]
        return dialect

    @property
    def max_new_tokens(self) -> int:
        """Of a reply."""
        count: int = self.values["sampling"]["max_new_tokens"]
        return count

    def playing(self) -> dict[str, Any]:
        """All that is not the environment, as fields of `EvalConfig`: the layout, the sampling, seed and episodes."""
        own = {name: self.values[name] for name in ("seed", "episodes") if name in self.values}
        return {"layout": self.layout, **self.values["sampling"], **own}

    def model(self) -> dict[str, Any]:
        """What a model keeps in any environment, as fields of `EvalConfig`: layout, dialect and the length of a reply."""
        return {"layout": self.layout, "dialect": self.dialect, "max_new_tokens": self.max_new_tokens}


def set_text(value: Any) -> str:
    """A value as `--set` takes it: JSON, or the text itself where that is not JSON.

    >>> set_text([1, 2]), set_text("bm25"), set_text("12")
    ('[1,2]', 'bm25', '"12"')
    """
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_card(policy: str) -> PlayRecord | None:
    """The `atommem.json` of a policy that is the folder of a model; None: it is not one, or has none.

    Raises:
        SettingError: the file is not one of this version.
    """
    path = Path(policy.removeprefix("vllm:")) / CARD
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long, and a policy may be any text
        return None
    card = read_record(path)
    version = card.values.get("schema_version") if card else None
    if card is None or version != _SCHEMA_VERSION:
        raise SettingError(
            f"{path} must be of schema {_SCHEMA_VERSION}, which this version of AtomMem reads; got {version!r}. Install the "
            "version that wrote it, or remove the file and say by options how the model is played."
        )
    return card


def read_run(folder: Path) -> PlayRecord:
    """How the episodes of a run were played.

    Raises:
        SettingError: the folder holds no run of `atommem eval`.
    """
    run = read_record(folder / "config.json")
    if run is None:
        raise SettingError(f"--like takes the folder of an evaluation, with its config.json; {folder} is not one.")
    return run


def read_record(path: Path) -> PlayRecord | None:
    """What a file says of how episodes were played; None: there is no such file, or it says nothing of that.

    Raises:
        DataError: it is no JSON object.
    """
    if not path.is_file():
        return None
    values = read_config(path)
    needed = {"env_id", "options", "settings", "layout", "sampling"}
    return PlayRecord(path, values) if needed <= set(values) else None
