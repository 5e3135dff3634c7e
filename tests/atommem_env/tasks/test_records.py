"""The range of what names a task, in all that take such names."""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401  registers the environments
from atommem_env.errors import OutOfRange, SettingError
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.haystack import HaystackSource
from atommem_env.tasks.records import check_range
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.types import TaskSource

HOTPOT = """[{"_id": "1", "question": "Who cooks?", "answer": "Ada", "type": "bridge", "level": "easy",
"supporting_facts": [["Ada", 0]], "context": [["Ada", ["Ada cooks."]], ["Bo", ["Bo sails."]]]}]"""


def files(folder: Path) -> TaskSource:
    (folder / "a.txt").write_text("Ada cooks.")
    return FilesSource(folder / "a.txt", question="Who cooks?")


def haystack(folder: Path) -> TaskSource:
    (folder / "dev.json").write_text(HOTPOT)
    return HaystackSource("hotpotqa", data=folder / "dev.json", num_docs=2)


@pytest.mark.parametrize("make", [files, haystack, lambda folder: SyntheticSource()])
def test_an_index_out_of_range_is_the_same_error_in_every_source(
    make: Callable[[Path], TaskSource], tmp_path: Path
) -> None:
    source = make(tmp_path)
    for index in (-1, len(source)):
        with pytest.raises(OutOfRange, match=f"^index must be from 0 to {len(source) - 1}, got {index}\\.$"):
            source.task(index, 0)


@pytest.mark.parametrize("make", [haystack, lambda folder: SyntheticSource()])
def test_a_seed_out_of_range_is_the_same_error_where_a_seed_matters(
    make: Callable[[Path], TaskSource], tmp_path: Path
) -> None:
    with pytest.raises(OutOfRange, match=r"^seed must be at least 0, got -1\.$"):
        make(tmp_path).task(0, -1)


def test_the_environment_says_it_as_its_source_does() -> None:
    env = gym.make("AtomMem-Synthetic", durability="off")
    with pytest.raises(OutOfRange, match=r"^index must be from 0 to 999999, got 1000000\.$"):
        env.reset(options={"index": 1_000_000})


@pytest.mark.parametrize("kind", [SettingError, ValueError, IndexError])
def test_it_can_be_caught_as_a_wrong_setting_and_as_a_wrong_index(kind: type[Exception]) -> None:
    check_range("seed", 10**30)
    with pytest.raises(kind):
        check_range("index", 3, 3)
