"""The wheel works outside the checkout."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.mark.xdist_group("slow")
def test_the_wheel_is_built_installed_and_used_without_the_checkout(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    # A fresh environment with the dependencies of this one in sight, and our wheel in front of the checkout.
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({site!r})\n"
        "import atommem_env, agents, eval\n"
        "assert 'venv' in atommem_env.__file__ and 'venv' in agents.__file__, atommem_env.__file__\n"
        "from atommem_env.cli import main\n"
        "sys.argv = ['atommem', 'eval', 'AtomMem-Synthetic', '--episodes', '2', '--out', 'run']\n"
        "main()"
    )
    ran = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
