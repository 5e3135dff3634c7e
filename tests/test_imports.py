"""The rooms of the house: imports run one way, `train → eval → agents → atommem_env`, and never in a circle.

Every import counts, wherever it stands: one inside a function or under TYPE_CHECKING ties two modules as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("atommem_env", "agents", "eval", "train")
# The command line and the front door load what stands above them when it is asked for, by name.
DOORS = {"atommem_env/cli.py", "atommem_env/__init__.py"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}


def imported_by(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below in MODULES:
                    yield below
                elif node.module in MODULES:
                    yield node.module


IMPORTS = {name: set(imported_by(path)) - {name} for name, path in MODULES.items()}


def test_no_import_runs_upward() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if FLOORS.index(name.partition(".")[0]) < FLOORS.index(other.partition(".")[0])
    ]
    assert not upward


def test_only_the_doors_name_what_stands_above() -> None:
    """Names in strings, as `load("eval.run:main")`, are imports too."""
    above = tuple(f"{floor}." for floor in FLOORS[1:])
    for name, path in MODULES.items():
        if name.startswith("atommem_env") and str(path.relative_to(ROOT)) not in DOORS:
            texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if is_text(node)]
            targets = [text for text in texts if text.startswith(above) and ":" in text and " " not in text]
            assert not targets, f"{name} names {targets}"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_circle() -> None:
    """Removes modules that import none of those left, until nothing is left, or only circles and what leads to them."""
    left = {name: set(others) for name, others in IMPORTS.items()}
    while done := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in done}
    assert not left, {name: sorted(others & left.keys()) for name, others in left.items()}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_file_fits_into_a_readers_head(floor: str) -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if name.startswith(floor) and count > 600}
