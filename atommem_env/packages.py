"""Whether `agents`, `eval` and `train` are this project's: the names are common, and other code has packages of these names.

`configs` holds files alone, which are read by their path: nothing that is called so can hide them.
"""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from atommem_env.errors import ShadowedPackage

PACKAGES = ("agents", "eval", "train")  # each imports those before it
_ROOT = Path(__file__).resolve().parents[1]
# What the `__init__.py` of each of them holds: another distribution can write its own over it, in the same folder.
_MARK = "from atommem_env.packages import check_packages"


def check_packages(top: str = "train", folder: Path | None = None) -> None:
    """Checks that `top`, and the packages that it imports, are this project's; none of them is imported for it.

    Args:
        top: one of `PACKAGES`.
        folder: looked in before `sys.path`: the working folder, where a job or a worker will look first.

    Raises:
        ShadowedPackage: one is not; the message names what hides or overwrote it, and what to do.
    """
    for name in PACKAGES[: PACKAGES.index(top) + 1]:
        ours = _ROOT / name / "__init__.py"
        spec = _spec(name, folder)
        if spec is None:
            continue  # the import will say so
        # A folder without an `__init__.py` has no origin.
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), name)).resolve()
        if found == ours.parent:
            raise ShadowedPackage(
                f"{ours} is missing: it went when another distribution with a package {name!r} was uninstalled. "
                f"Reinstall this one: {_REINSTALL}"
            )
        if found != ours:
            raise ShadowedPackage(_hidden(name, found))
        if _MARK not in ours.read_text(encoding="utf-8", errors="replace"):
            raise ShadowedPackage(_overwritten(name, ours))


def _spec(name: str, folder: Path | None) -> ModuleSpec | None:
    """What `import name` imports, or has imported."""
    first = PathFinder.find_spec(name, [str(folder)]) if folder else None
    if first and first.origin:  # a folder without an `__init__.py` hides no package that has one
        return first
    try:
        return find_spec(name)
    except ValueError:  # a module that was made without a spec
        return ModuleSpec(name, None, origin=getattr(sys.modules[name], "__file__", None))


_REINSTALL = "pip install --force-reinstall --no-deps atommem"


def _hidden(name: str, found: Path) -> str:
    where = found.parent if found.name == "__init__.py" else found
    text = f"{where} hides the package {name!r} of atommem ({_ROOT / name})"
    owners = _owners(found)
    if owners:
        return f"{text}; {owners} installed it. Give atommem a virtual environment of its own, or uninstall {owners}."
    return (
        f"{text}. Rename it, or keep {where.parent} off Python's path: run from another folder, or with `python -P`, which "
        "leaves out a script's own folder and, with -m, the working folder."
    )


def _overwritten(name: str, ours: Path) -> str:
    owners = _owners(ours) or "another distribution"
    return (
        f"{ours} is no longer that of atommem: {owners} has a package {name!r} too, and wrote its own over it. Give atommem a "
        f"virtual environment of its own; or uninstall {owners}, and reinstall this one: {_REINSTALL}"
    )


def _owners(file: Path) -> str:
    """The distributions, but ours, that installed a file; "" for none."""
    names = {
        distribution.name
        for distribution in importlib.metadata.distributions()
        for path in distribution.files or ()
        if path.name == file.name
        and path.parts[-2:-1] in ((), (file.parent.name,))  # else each is looked up on the disk
        if Path(str(distribution.locate_file(path))).resolve() == file
    }
    return ", ".join(sorted(names - {"atommem"}))
