"""A checkpoint gives back what it was given, or says why not; the one before survives whatever happens to the next."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atommem_env.errors import CheckpointError  # noqa: E402
from train import checkpoints  # noqa: E402


def small_model() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "step": 3,
        "weights": checkpoints.trained_weights(model),
        "optimizer": optimizer.state_dict(),
        "random": checkpoints.random_state(),
        "best": {"em": 0.25, "weights": None},
    }
    checkpoints.save(tmp_path / "new" / "checkpoint.pt", state)
    loaded = checkpoints.load(tmp_path / "new" / "checkpoint.pt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.pt"]
    assert (loaded["step"], loaded["best"]) == (3, {"em": 0.25, "weights": None})
    other = small_model()
    frozen = other[0].bias.clone()
    checkpoints.load_weights(other, loaded["weights"])
    for name, weight in checkpoints.trained_weights(model).items():
        assert torch.equal(dict(other.named_parameters())[name], weight)
    assert torch.equal(other[0].bias, frozen)
    assert "0.bias" not in loaded["weights"]
    for one, two in zip(optimizer.state.values(), loaded["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    before = checkpoints.random_state()
    first = draw()
    assert draw() != first
    checkpoints.set_random_state(before)
    assert draw() == first


def test_weights_of_another_model_are_rejected_and_none_is_set() -> None:
    model = small_model()
    before = [weight.clone() for weight in model.parameters()]
    weights = {name: torch.zeros_like(weight) for name, weight in checkpoints.trained_weights(model).items()}
    for wrong in (weights | {"1.bias": torch.zeros(5)}, weights | {"2.bias": torch.zeros(2)}, {}):
        with pytest.raises(CheckpointError, match="another model"):
            checkpoints.load_weights(model, wrong)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 the beginning of one"])
def test_what_is_no_checkpoint_is_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load(path)


def test_a_checkpoint_that_was_truncated_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, {"weights": torch.arange(5000)})
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.load(path)


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.created,)


def test_a_checkpoint_of_someone_else_cannot_run_code(tmp_path: Path) -> None:
    path, created = tmp_path / "checkpoint.pt", tmp_path / "created"
    for state in (Malicious(created), {"step": 1, "random": Malicious(created)}):
        for write in (torch.save, lambda value, to: to.write_bytes(pickle.dumps(value))):
            write(state, path)
            with pytest.raises(CheckpointError, match=r"was not read|not a whole file"):
                checkpoints.load(path)
            assert not created.exists()
    pickle.loads(path.read_bytes())
    assert created.exists()  # it would have run


def test_a_checkpoint_of_an_earlier_version_says_how_to_continue(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "random": {"numpy": np.random.get_state()}}, path)  # noqa: NPY002
    with pytest.raises(CheckpointError, match=r"with the version that began it, or start a new"):
        checkpoints.load(path)
    torch.save({"step": 1}, path)
    with pytest.raises(CheckpointError, match="is no checkpoint of format 2"):
        checkpoints.load(path)


@pytest.mark.parametrize("limit", [1000, 70_000])
def test_a_full_disk_leaves_the_one_before(limit: int, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on a file's size fails as a full disk does, in the write
    path = tmp_path / "checkpoint.pt"
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in ("There is none from before", "The one before is intact"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
        try:
            with pytest.raises(CheckpointError, match=f"could not be written .*MB are free there. {before}"):
                checkpoints.save(path, {"weights": torch.zeros(20_000), "step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert not list(tmp_path.glob(".*"))
        if not path.exists():
            checkpoints.save(path, {"step": 1})
    assert checkpoints.load(path) == {"step": 1}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoint\.pt could not be written"):
        checkpoints.save(tmp_path / "file" / "checkpoint.pt", {"step": 1})
