"""`atommem settings`: what can be set in an environment, as its own documentation says it.

One source of truth: the comments beside the fields of `EpisodeSettings`, the "Args" of a task source and the "Arguments" of
`AtomMemEnv`.
"""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from io import StringIO
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from atommem_env.env import AtomMemEnv
from atommem_env.make import find_spec
from atommem_env.tasks import SOURCES, source_options
from atommem_env.terminal import escape
from atommem_env.types import EpisodeSettings


@dataclass(frozen=True, slots=True)
class Setting:
    """One keyword argument of `gym.make`."""

    name: str
    default: str  # as it is written in Python
    meaning: str


def settings_command(
    env_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV_ID")] = "AtomMem-Synthetic", /
) -> None:
    """List what can be set in an environment, with its defaults: by `--set NAME=VALUE`, or by keyword in `gym.make`.

    A value is written as JSON: --set top_k=12 scratchpad=false operations='["create","read"]'; text needs no quotes.

    Args:
        env_id: The environment whose settings and defaults are listed.
    """
    console = Console()
    for title, settings in settings_of(env_id).items():
        table = Table("name", "default", "meaning", title=title, title_justify="left")
        for setting in settings:
            table.add_row(setting.name, escape(setting.default), escape(setting.meaning))
        console.print(table)


def settings_of(env_id: str) -> dict[str, list[Setting]]:
    """The settings of an environment of this project: of its episodes, its tasks, and of the environment itself.

    Raises:
        SettingError: there is no such environment, or it is not of this project.
        PluginError: as in `find_spec`.
    """
    spec = find_spec(env_id)
    arguments = inspect.signature(AtomMemEnv).parameters
    episode = {field.name: field.default for field in fields(EpisodeSettings)}
    groups = {"Episode": (dict(_field_comments(EpisodeSettings)), episode)}
    source = spec.kwargs.get(next(iter(arguments)))
    if source in SOURCES:
        groups["Tasks"] = dict(_args(SOURCES[source])), _defaults(source_options(source))
    groups["Environment"] = dict(_arguments(AtomMemEnv)), _defaults(arguments)
    return {
        title: [
            Setting(name, repr(spec.kwargs.get(name, defaults.get(name))), meaning)
            for name, meaning in meanings.items()
        ]
        for title, (meanings, defaults) in groups.items()
    }


def _defaults(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in parameters.items()}


def _field_comments(made: type) -> Iterator[tuple[str, str]]:
    """Name and comment of each field of a dataclass."""
    source = inspect.getsource(made)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield node.target.id, " ".join(comments[line] for line in lines if line in comments)


def _args(source: Any) -> Iterator[tuple[str, str]]:
    """Name and meaning of each entry below "Args:" in a docstring."""
    text = inspect.getdoc(source.func if isinstance(source, partial) else source) or ""
    block = re.search(r"^Args:\n((?: .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
    bound = len(source.args) if isinstance(source, partial) else 0
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block[1] if block else "", flags=re.MULTILINE)
    for name, meaning in found[bound:]:
        yield name, " ".join(meaning.split())


def _arguments(made: type) -> Iterator[tuple[str, str]]:
    """Name and meaning of each argument below "## Arguments" in a documentation page in Gymnasium's form."""
    text = (inspect.getdoc(made) or "").partition("## Arguments\n")[2].partition("\n## ")[0]
    for name, meaning in re.findall(r"^\* `(\w+)`[^:]*: (.*(?:\n  .*)*)", text, flags=re.MULTILINE):
        yield name, " ".join(meaning.split())
