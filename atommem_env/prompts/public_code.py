"""The layout of AtomMem's public code (RUCBM/AtomMem), in its own words: `public_code:PATH`, to evaluate its published model.

The words are not part of this project. They are read from your own checkout of that code at PATH (its folder, or the file
itself), whose source is parsed and never run. A system and a user message are made as that code makes them in training.

For episodes with `dialect="public_code"`, which writes the operations that those words explain; whoever switches some of them
off edits a copy of the file. What that code has no slot for is not shown: `notice`, and how many replies are left. What an
`Observation` does not hold is the number of searches in a row: here nothing limits them while reading, and 0 is shown.
"""

from __future__ import annotations

import ast
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atommem_env.errors import SettingError
from atommem_env.types import EpisodeSettings, Message, Observation, Phase

_FILE = "recurrent/impls/memory_long_short_multiquery.py"
_ANSWERING_SLOTS = {"prompt", "short_memory", "query", "long_memory", "query_times"}
# The variables that hold the words, and the slots of those that have any.
_SLOTS = {
    "SYSTEM_PROMPT": set(),
    "TEMPLATE_MEMORY": _ANSWERING_SLOTS | {"chunk"},
    "TEMPLATE_FINAL_BOXED": _ANSWERING_SLOTS,
}
# Attributes: what is shown where no entry was found, and before the first search.
_ATTRIBUTES = ("NO_MEMORY_TOKENS", "query")


@dataclass(frozen=True, slots=True)
class PublicCode:
    """The layout with the words of one checkout; see `read`."""

    system: str
    reading: str  # template
    answering: str  # template
    no_memory: str
    no_query: str

    def messages(self, observation: Observation, settings: EpisodeSettings) -> list[Message]:
        """A system message and one user message.

        Raises:
            SettingError: the episode is in another dialect than these words explain.
        """
        if settings.dialect != "public_code":
            raise SettingError(
                f"The layout public_code explains the dialect 'public_code', got dialect {settings.dialect!r}. Set "
                "dialect='public_code', or take another layout."
            )
        slots = {
            "short_memory": observation["scratchpad"],
            "query": observation["query"] or self.no_query,
            "long_memory": observation["retrieved"] or self.no_memory,
            "query_times": "0",
        }
        if observation["phase"] == Phase.READ:
            user = self.reading.format(prompt=observation["questions"], chunk=observation["chunk"], **slots)
        else:
            user = self.answering.format(prompt=observation["question"], **slots)
        return [Message(role="system", content=self.system), Message(role="user", content=user)]


@cache
def read(path: str) -> PublicCode:
    """The layout in the words of the checkout at `path`: its folder, or the file with the templates. Read once a process.

    Raises:
        SettingError: there is no such file, or it does not hold the templates with their slots.
    """
    place = Path(path).expanduser()
    candidates = [place] if place.suffix == ".py" else [place / "AtomMem" / _FILE, place / _FILE]
    file = next((candidate for candidate in candidates if path and candidate.is_file()), None)
    if file is None:
        raise SettingError(
            f"The layout public_code:PATH reads its words from your checkout of https://github.com/RUCBM/AtomMem; got PATH "
            f"{path!r}, and there is no {' and no '.join(map(str, candidates))}. Clone that repository and give its folder."
        )
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise SettingError(f"The layout public_code expected Python source in {file}: {error}.") from error
    words = _module_strings(tree)
    attributes = _attribute_strings(tree)
    missing = [name for name in _SLOTS if name not in words]
    missing += [f"self.{name}" for name in _ATTRIBUTES if name not in attributes]
    if missing:
        raise SettingError(
            f"The layout public_code looked in {file} for text assigned to {', '.join(missing)} and found none; is it the "
            "file of AtomMem's public code, unchanged?"
        )
    for name, slots in _SLOTS.items():
        if slots:
            _check_slots(words[name], slots, f"{name} in {file}")
    return PublicCode(*(words[name] for name in _SLOTS), *(attributes[name] for name in _ATTRIBUTES))


def _module_strings(tree: ast.Module) -> dict[str, str]:
    """The variables of a module that are assigned text, or sums of text.

    >>> _module_strings(ast.parse("A = 'a'; B = A + 'b'; A = A + B; C = f(A); B = len(B)"))
    {'A': 'aab'}
    """
    known: dict[str, str] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            text = _text(statement.value, known)
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    known.pop(target.id, None)  # what it was no longer holds
                    if text is not None:
                        known[target.id] = text
    return known


def _text(value: ast.expr, known: dict[str, str]) -> str | None:
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return known.get(name)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _text(left, known), _text(right, known)
            return None if first is None or second is None else first + second
    return None


def _attribute_strings(tree: ast.Module) -> dict[str, str]:
    """The attributes that are assigned text or a list that starts with text, as they are first.

    >>> _attribute_strings(ast.parse("self.a = 'x'; self.b = ['y'] * n; self.a = 'z'; self.c = 1"))
    {'a': 'x', 'b': 'y'}
    """
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(
                targets=[ast.Attribute(attr=name)],
                value=ast.Constant(value=str(text))
                | ast.BinOp(left=ast.List(elts=[ast.Constant(value=str(text)), *_]), op=ast.Mult()),
            ):
                found.setdefault(name, text)
    return found


def _check_slots(template: str, expected: set[str], where: str) -> None:
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise SettingError(f"The layout public_code expected a template in {where}: {error}.") from error
    slots = {name for _, name, _, _ in fields}
    if slots != expected or any(form or conversion for _, _, form, conversion in fields):
        raise SettingError(
            f"The layout public_code expected the slots {sorted(expected)} in {where}, each as {{name}}; found "
            f"{sorted(map(str, slots))}."
        )
