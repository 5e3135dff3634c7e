"""Recipes that are based on one another: what they say together, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from atommem_env.errors import SettingError
from eval.toml_tables import read_recipe_file, read_table


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder of shipped recipes with one, `paper`."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "paper.toml").write_text(
        'seeds = [0, 1]\n[env]\nset = ["top_k=6"]\nnum_docs = 200\n[grpo]\nsteps = 200\n'
    )
    return folder


def test_tables_are_merged_key_by_key_set_is_joined_and_other_lists_are_replaced(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'base = "paper"\nseeds = [7]\n[env]\nset = ["top_k=2", "capacity=9"]\n[grpo]\nout = "runs/mine"\n[sft]\nepochs = 1\n'
    )
    assert read_recipe_file(str(tmp_path / "mine.toml"), shipped).tables == {
        "seeds": [7],
        "env": {"set": ["top_k=6", "top_k=2", "capacity=9"], "num_docs": 200},
        "grpo": {"steps": 200, "out": "runs/mine"},
        "sft": {"epochs": 1},
    }


def test_other_lists_can_be_joined_as_well(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "paper"\nseeds = [7]')
    file = read_recipe_file(str(tmp_path / "mine.toml"), shipped, joined=("seeds",))
    assert file.tables["seeds"] == [0, 1, 7]


def test_a_chain_of_bases_is_followed_and_paths_are_relative_to_the_file(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "below.toml").write_text('base = "paper.toml"\n[grpo]\nsteps = 3\ngroups = 4')
    (tmp_path / "a" / "b" / "top.toml").write_text('base = "../below.toml"\n[grpo]\ngroups = 5')
    monkeypatch.chdir(tmp_path / "a" / "b")
    file = read_recipe_file("top.toml", shipped)
    assert file.tables["grpo"] == {"steps": 3, "groups": 5}
    assert file.tables["env"]["num_docs"] == 200
    assert str(file) == f"top.toml (base: ../below.toml, {shipped / 'paper.toml'})"
    assert file.name == "top"


def test_a_shipped_recipe_is_called_by_its_name_and_a_file_of_ones_own_comes_before_it_by_its_path(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe_file("paper", shipped) == read_recipe_file("paper.toml", shipped)
    (tmp_path / "paper.toml").write_text('base = "paper"\n[grpo]\nsteps = 1\n')  # based on its namesake
    (tmp_path / "paper").write_text("steps = 1")
    assert read_recipe_file("paper.toml", shipped).tables["grpo"] == {"steps": 1}
    assert read_recipe_file("paper", shipped).tables["grpo"] == {"steps": 200}


def test_a_circle_names_its_files(shipped: Path, tmp_path: Path) -> None:
    for name, base in (("one", "two.toml"), ("two", "three.toml"), ("three", "one.toml"), ("self", "self.toml")):
        (tmp_path / f"{name}.toml").write_text(f'base = "{base}"')
    with pytest.raises(SettingError, match=r"circle: \S*one.toml → \S*two.toml → \S*three.toml → \S*one.toml\."):
        read_recipe_file(str(tmp_path / "one.toml"), shipped)
    with pytest.raises(SettingError, match=r"circle: \S*self.toml → \S*self.toml\."):
        read_recipe_file(str(tmp_path / "self.toml"), shipped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 'papre'", r"mine.toml: base is one of paper, or the path of a TOML file; got 'papre'"),
        ("base = 3", r"mine.toml: base must be the name or the path of a recipe, got 3"),
        ("base = 'broken.toml'", r"broken.toml is not TOML"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(text: str, message: str, shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "broken.toml").write_text("[grpo")
    with pytest.raises(SettingError, match=message):
        read_recipe_file(str(tmp_path / "mine.toml"), shipped)


def test_none_takes_a_value_away_where_there_need_not_be_one() -> None:
    fields = {"embedder": str | None, "layout": str}
    read = read_table("mine.toml", "env", {"embedder": "None", "layout": "None"}, fields)
    assert read == {"embedder": None, "layout": "None"}
