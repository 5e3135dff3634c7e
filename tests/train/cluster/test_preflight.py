"""Preflight: everything that cannot work is rejected with its reason, all at once; and the sums are right in small cases."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("torch")

from agents.models.find import TINY
from atommem_env.errors import SettingError
from train.cluster.machines import Machines, Node
from train.cluster.preflight import check_embedder, check_machines, check_services, make_plan
from train.cluster.recipe import VERSION, ClusterGRPOConfig, openrlhf_flags, read_recipe
from train.shapes import ModelSize

GB = 10**9
SIZE = ModelSize(
    parameters=1000, linear_width=50, layers=2, hidden=8, intermediate=16, heads=12, kv_heads=4, head_dim=4,
    normalised_heads=False, vocabulary=10, window=20_000,
)  # fmt: skip
RUN = ClusterGRPOConfig(env_id="AtomMem-HotpotQA", model="nowhere/small", max_new_tokens=512)
EIGHT = Machines((Node("a", 8, 80 * GB),))
# A run of the synthetic world on the shipped model: all of it is here.
SMALL = ClusterGRPOConfig(
    env_id="AtomMem-Synthetic", model="tiny", nodes=1, gpus_per_node=1, engines=1, groups=4, group_size=4, num_docs=8,
    set=("chunk_tokens=64", "memory_tokens=64", "scratchpad_tokens=64"), max_new_tokens=16, max_tokens=2048,
    micro_batch_tokens=2048, eval_episodes=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": 4}, r"nodes × gpus_per_node = 1 × 8 = 8 with colocate; got .* 4 × 1 = 4\. Set engines to 8"),
        ({"tensor_parallel": 2}, r"got engines × tensor_parallel = 8 × 2 = 16\. Set engines to 4"),
        ({"colocate": False}, "must leave a GPU .* = 8 to train on; got .* 8 × 1 = 8"),
        ({"colocate": False, "nodes": 2, "engines": 5}, "same number on each of 2 nodes; .* leaves 11"),
        ({"tensor_parallel": 16, "engines": 1, "nodes": 2}, "divide gpus_per_node = 8.*; got 16"),
        ({"tensor_parallel": 3, "engines": 2, "gpus_per_node": 6}, "the model's 4 heads of keys and values; got 3"),
        ({"tensor_parallel": 8, "engines": 1}, "the model's 12 attention heads; got 8"),
        ({"groups": 2, "group_size": 3}, r"at least the 8 GPUs that train.*; got 2 × 3 = 6\. Raise groups"),
        ({"max_tokens": 30_000, "micro_batch_tokens": 30_000}, "at most 20000, the model's window.*; got 30000"),
        ({"max_tokens": 8192}, r"max_tokens must be at least \d+, .*6,964 \(chunk_tokens\).*512 \(max_new_tokens\)"),
        ({"micro_batch_tokens": 16_000}, "at least max_tokens = 16384.*; got 16000"),
        ({"embedding_model": "a", "embedder": "openai:b"}, "embedder must be 'openai:a'.*; got 'openai:b'"),
        ({"set": ("chunk_size=3",)}, "environment: No setting is called chunk_size"),
        ({"layout": "none"}, "environment: layout must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_rejected_with_what_to_change(changes: dict[str, Any], message: str) -> None:
    make_plan(RUN, SIZE)
    with pytest.raises(SettingError, match=message):
        make_plan(replace(RUN, **changes), SIZE)


def test_all_that_is_wrong_is_listed_at_once() -> None:
    wrong = replace(RUN, engines=4, groups=1, group_size=2, max_tokens=8192, openrlhf=("--rollout.top_p=0.9",))
    with pytest.raises(SettingError) as rejected:
        make_plan(wrong, SIZE)
    assert str(rejected.value).count("\n- ") == 4


def test_a_model_that_nobody_knows_is_checked_as_far_as_can_be() -> None:
    assert make_plan(replace(RUN, tensor_parallel=8, engines=1)).size is None
    with pytest.raises(SettingError, match="with colocate"):
        make_plan(replace(RUN, engines=3))
    described = make_plan(replace(RUN, model="Qwen/Qwen3-8B"))
    assert described.size is not None
    assert described.size.parameters == 8_190_735_360
    assert "Qwen/Qwen3-8B" in described.missing_model


@pytest.mark.parametrize(
    "flag",
    [
        "--algo.advantage.is_correction_level=off",  # the engines would record no log-probabilities
        "--algo.advantage.is_correction_mode", "--train.batch_size=8", "--actor.entropy_coef=0.01", "--ckpt.load_enable",
        "--vllm.enable_sleep", "--data.max_len=99", "--train.dynamic_batch", "--actor.eps_clip=0.1",
    ],
)  # fmt: skip
def test_flags_that_the_recipe_derives_are_not_free(flag: str) -> None:
    with pytest.raises(SettingError, match=f"no setting of the recipe stands for; got {flag}"):
        make_plan(replace(RUN, openrlhf=(flag, "1")), SIZE)


@pytest.mark.parametrize(
    "flag",
    [
        "--rollout.top_p=0.9", "--rollout.top_=0.9", "--train.num_episodes=2", "--train.max_epochs=2", "--critic.optim=adam",
        "--reward.normalize_enable", "--actor.policy_loss_type=gspo", "--ds.ring_attn_size=2",
    ],
)  # fmt: skip
def test_flags_that_would_break_the_contract_are_not_free(flag: str) -> None:
    with pytest.raises(SettingError, match=f"as it is: .*; got {flag}"):
        make_plan(replace(RUN, openrlhf=(flag,)), SIZE)


def test_other_flags_are_free() -> None:
    free = ("--vllm.enforce_eager", "--vllm.sync_backend=gloo", "--ds.zpg", "8", "--actor.adam.betas", "0.9", "0.95")
    run = replace(RUN, openrlhf=free)
    make_plan(run, SIZE)
    assert openrlhf_flags(run, TINY)[-8:] == [word for flag in free for word in flag.split("=")]


@given(new=st.integers(1, 4096), chunk=st.integers(1, 8192), questions=st.integers(1, 10), scratchpad=st.booleans())
def test_the_budget_that_is_asked_for_is_enough_and_no_less(
    new: int, chunk: int, questions: int, scratchpad: bool
) -> None:
    options = (f"chunk_tokens={chunk}", f"scratchpad={str(scratchpad).lower()}")
    run = replace(RUN, max_new_tokens=new, questions=questions, set=options, max_tokens=1)
    size = replace(SIZE, window=10**6)
    with pytest.raises(SettingError, match="max_tokens must be at least") as rejected:
        make_plan(run, size)
    needed = int(str(rejected.value).split("max_tokens must be at least ")[1].split(",")[0])
    assert needed >= 1.7 * chunk + new * (3 if scratchpad else 2) or needed >= 1.7 * (chunk + 2048)
    make_plan(replace(run, max_tokens=needed, micro_batch_tokens=needed), size)
    with pytest.raises(SettingError, match=f"at least {needed}, "):
        make_plan(replace(run, max_tokens=needed - 1, micro_batch_tokens=needed), size)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((), "= 8 GPUs; got no machine"),
        (((4, 80),), "= 8 GPUs; got n0: 4"),
        (((4, 80), (4, 80)), "needs 1 machines of 8 GPUs each; got n0: 4, n1: 4"),
    ],
)
def test_too_few_gpus_in_all_or_on_a_node(nodes: tuple[tuple[int, int], ...], message: str) -> None:
    machines = Machines(tuple(Node(f"n{i}", gpus, memory * GB) for i, (gpus, memory) in enumerate(nodes)))
    with pytest.raises(SettingError, match=message):
        check_machines(make_plan(RUN, SIZE), machines)
    check_machines(make_plan(RUN, SIZE), EIGHT)


def test_memory_is_rejected_with_its_sum_and_what_would_help() -> None:
    run = read_recipe("qwen3-8b-hotpotqa")
    check_machines(make_plan(run), EIGHT)
    check_machines(make_plan(run), Machines((Node("a", 8, None),)))  # pretended GPUs: nothing is known of their memory
    with pytest.raises(SettingError) as rejected:
        check_machines(make_plan(replace(run, zero_stage=2, gradient_checkpointing=False)), EIGHT)
    message = str(rejected.value)
    assert "while it updates; got 80.0 GB" in message
    assert "16.4 GB  8,190,735,360 parameters × 2 bytes\n" in message  # ZeRO 2 leaves every GPU a whole copy
    assert "24.9 GB  16,384 tokens × 151,936 vocabulary × 10 bytes" in message
    assert "gradient_checkpointing = true, zero_stage = 3, offload_optimizer = true" in message
    with pytest.raises(SettingError, match=r"(?s)while it samples; got 80\.0 GB.*lower gpu_memory_utilization"):
        check_machines(make_plan(replace(run, gpu_memory_utilization=0.95)), EIGHT)
    with pytest.raises(SettingError, match=r"keys and values of max_tokens = 16384 tokens, 2\.4 GB; got 0\.6 GB"):
        check_machines(make_plan(replace(run, gpu_memory_utilization=0.25)), EIGHT)


def problems(run: ClusterGRPOConfig) -> list[str]:
    """What the services lack, without the packages of the cluster, which the machine of a test need not have."""
    try:
        check_services(make_plan(run))
    except SettingError as error:
        lines = str(error).split("\n- ")[1:]
        return [line for line in lines if not line.startswith(("openrlhf must", "deepspeed, ray and vllm"))]
    return []


def test_services_that_stand_are_not_rejected() -> None:
    assert problems(SMALL) == []
    assert problems(replace(SMALL, eval_every=0)) == []
    check_embedder(SMALL)
    make_plan(SMALL)


def test_services_that_are_missing_are_all_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = replace(
        SMALL, env_id="AtomMem-HotpotQA", model=str(tmp_path), embedder="openai:none", wandb_project="p", set=(),
        max_tokens=16_384, micro_batch_tokens=16_384,
    )  # fmt: skip
    model, train, held_out, embedder, key = problems(run)
    assert model.startswith("model: Expected the folder of a Hugging Face model")
    assert train.startswith("split: ")
    assert held_out.startswith("eval_split: ")
    assert all("atommem data import hotpotqa" in message for message in (train, held_out))
    assert embedder.startswith("embedder: ")
    assert key.startswith("wandb_project = 'p' needs a key in the variable WANDB_API_KEY")
    assert problems(replace(run, embedding_model="none")) == [model, train, held_out, key]  # it serves its own, later
    with pytest.raises(SettingError, match="embedder: "):
        check_embedder(run)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert len(problems(run)) == 4


def test_an_environment_without_enough_tasks_is_rejected(shared_data: Path) -> None:
    run = replace(SMALL, env_id="AtomMem-MuSiQue", data=shared_data / "musique_dev.jsonl.gz", num_docs=20, eval_every=0)
    assert problems(run) == []
    (message,) = problems(replace(run, groups=400))
    assert "at least groups = 400 tasks, so that none is taken twice at a time; got 315" in message
    (message,) = problems(replace(run, env_id="AtomMem-Nothing"))
    assert message.startswith("environment: There is no environment 'AtomMem-Nothing'")


def test_a_model_folder_without_a_template_or_an_end_is_rejected(tmp_path: Path) -> None:
    import json

    for missing in ("chat_template", "eos_token"):
        folder = tmp_path / missing
        shutil.copytree(TINY, folder)
        path = folder / "tokenizer_config.json"
        fields = json.loads(path.read_text())
        if missing == "eos_token":
            del fields["eos_token"]
        else:
            fields.pop("chat_template", None)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        path.write_text(json.dumps(fields))
        (message,) = problems(replace(SMALL, model=str(folder)))
        assert message.startswith("model: ")
        assert missing in message.replace(" ", "_")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (message,) = problems(replace(SMALL, model=str(folder)))
    assert message.startswith("model: ")


def test_another_openrlhf_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def text(version: str) -> str:
        folder = tmp_path / version
        info = folder / f"openrlhf-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: openrlhf\nVersion: {version}\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            try:
                check_services(make_plan(SMALL))
            except SettingError as error:
                return str(error)
        return ""

    assert f"openrlhf must be version {VERSION}, whose inner functions are built upon; got 0.11.3" in text("0.11.3")
    assert "openrlhf must be" not in text(VERSION)
