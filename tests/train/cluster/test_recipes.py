"""The recipes that ship: they pass preflight on the machines they name, are what they say, and their arithmetic is ours."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

from atommem_env.errors import SettingError
from train.cluster.machines import Machines, Node
from train.cluster.preflight import check_machines, make_plan
from train.cluster.recipe import FOLDER, ClusterGRPOConfig, read_recipe, recipe_names
from train.estimate import estimate
from train.shapes import environment_of

GB = 10**9
PAPER = ("qwen3-8b-hotpotqa", "qwen3-8b-2wiki", "qwen3-8b-musique")


def memory_of(name: str) -> int:
    return (40 if name == "qwen3-0.6b" else 80) * GB


def machines(run: ClusterGRPOConfig, memory: int) -> Machines:
    return Machines(tuple(Node(f"n{number}", run.gpus_per_node, memory) for number in range(run.nodes)))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_passes_on_the_machines_it_needs(name: str) -> None:
    run = read_recipe(name)
    plan = make_plan(run)
    check_machines(plan, machines(run, memory_of(name)))
    with pytest.raises(SettingError, match="a GPU must have about"):
        check_machines(plan, machines(run, memory_of(name) // 2))


@pytest.mark.parametrize("name", recipe_names())
def test_its_comments_have_the_figures_of_the_estimate(name: str) -> None:
    plan = make_plan(read_recipe(name))
    assert plan.size is not None
    lines = [" ".join(line.split()) for line in (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()]
    assert lines[0].startswith("# ")
    for row in estimate(plan.run, plan.size, plan.task, memory_of(name)):
        assert " ".join(["#", *row]) in lines


def test_there_is_a_recipe_for_every_row_and_none_writes_into_the_folder_of_another() -> None:
    ablations = {
        f"qwen3-8b-hotpotqa-{what}"
        for what in ("no-update", "no-delete", "no-scratchpad", "no-storage", "random-retrieval")
    }
    assert set(recipe_names()) == {*PAPER, *ablations, "qwen3-8b-public-code", "qwen3-8b-2-nodes", "qwen3-0.6b"}
    assert len({read_recipe(name).out for name in recipe_names()}) == len(recipe_names())


@pytest.mark.parametrize("name", PAPER)
def test_the_settings_are_the_papers(name: str) -> None:
    run = read_recipe(name)
    assert (run.model, run.nodes, run.gpus_per_node) == ("Qwen/Qwen3-8B", 1, 8)
    assert (run.groups, run.group_size, run.learning_rate, run.kl_coef) == (16, 16, 1e-6, 0)
    assert (run.clip_low, run.clip_high, run.divide_by_std, run.temperature, run.seed) == (0.2, 0.28, False, 1, 42)
    assert run.embedder == f"openai:{run.embedding_model}" == "openai:Qwen/Qwen3-Embedding-0.6B"
    dataset, settings, source = environment_of(run)
    assert dataset == {"hotpotqa": "hotpotqa", "2wiki": "2wikimultihopqa", "musique": "musique"}[name.split("-")[-1]]
    assert (settings.chunk_tokens, settings.top_k, source["num_docs"]) == (4096, 6, 200)


def test_the_public_codes_settings() -> None:
    run = read_recipe("qwen3-8b-public-code")
    assert (run.groups, run.group_size, run.kl_coef, run.warmup_steps) == (8, 8, 0.001, 20)
    assert environment_of(run)[1].chunk_tokens == 4000


@pytest.mark.parametrize(
    ("ablation", "changed"),
    [
        ("no-update", {"operations": ("create", "read", "delete")}),
        ("no-delete", {"operations": ("create", "read", "update")}),
        ("no-scratchpad", {"scratchpad": False}),
        ("no-storage", {"operations": ()}),
        ("random-retrieval", {"retrieval": "random"}),
    ],
)
def test_an_ablation_changes_one_thing(ablation: str, changed: dict[str, object]) -> None:
    whole, run = read_recipe("qwen3-8b-hotpotqa"), read_recipe(f"qwen3-8b-hotpotqa-{ablation}")
    assert environment_of(run)[1] == replace(environment_of(whole)[1], **changed)  # type: ignore[arg-type]
    same = {"set": whole.set, "out": whole.out}
    if ablation == "no-storage":  # nothing to embed
        same |= {"embedder": whole.embedder, "embedding_model": whole.embedding_model}
    assert replace(run, **same) == whole  # type: ignore[arg-type]


def test_two_machines_train_the_same() -> None:
    one, two = read_recipe("qwen3-8b-hotpotqa"), read_recipe("qwen3-8b-2-nodes")
    assert replace(two, nodes=1, engines=8, out=one.out) == one
    assert two.training_gpus == 2 * one.training_gpus
