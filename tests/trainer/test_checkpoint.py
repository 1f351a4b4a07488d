"""Checkpoints: bitwise round trips between layouts, and one line for every fault."""

import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer import manifest
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.manifest import CheckpointError
from trainer.stored import read_tensors
from trainer.tree import fill, flatten

ABOUT = {"model": {"d_model": 12, "cycle": ["moe"]}, "tokenizer": "5e1f"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PROGRESS = {"step": 3, "tokens": 96, "loader": {"batch": 3}, "seed_used": 0.1 + 0.2}


def config(*, every: int = 1, keep: int = 0, resume: str = "auto") -> CheckpointConfig:
    return CheckpointConfig(every=every, keep=keep, resume=resume, init=None)


def alone(folder: Path, *, about: dict[str, Any] = ABOUT, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, config=config(**settings), rank=0, world_size=1, about=about)


def grouped(folder: Path, *, about: dict[str, Any] = ABOUT, **settings: Any) -> Checkpoints:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Checkpoints(folder, config=config(**settings), rank=rank, world_size=world_size, about=about)


class Small(nn.Module):
    """Awkward on purpose: odd sizes, one row, a scalar's worth of bias, a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 17)
        self.down = nn.Linear(17, 1)
        self.balance_bias: Tensor
        self.register_buffer("balance_bias", torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 12) to (N, 1)."""
        return self.down(torch.relu(self.up(x)))


def trained(layout: str, *, dtype: torch.dtype, steps: int, seed: int = 0) -> dict[str, Any]:
    """The live state of a small model after some updates on the same data in every layout."""
    torch.manual_seed(seed)
    model = Small().to(dtype)
    if layout != "plain":
        size = dist.get_world_size()
        names = {"fsdp": ("shard",), "hsdp": ("replicate", "shard")}[layout]
        shape = {"fsdp": (size,), "hsdp": (2, size // 2)}[layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for i in range(max(steps, 1)):
        torch.manual_seed(i)
        model(torch.randn(8, 12, dtype=dtype)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.balance_bias.add_(0.001)
    if steps == 0:
        with torch.no_grad():
            for leaf in flatten({"m": model.state_dict(), "o": optimizer.state_dict()["state"]}).values():
                (leaf.to_local() if isinstance(leaf, DTensor) else leaf).fill_(-7)
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def full(state: dict[str, Any]) -> dict[str, Any]:
    """Every leaf by name, DTensors gathered, tensors as bytes, so that equal means bitwise equal."""
    leaves = {}
    for name, leaf in flatten(state).items():
        if isinstance(leaf, Tensor):
            whole = leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
            leaf = (str(whole.dtype), tuple(whole.shape), bytes(whole.detach().contiguous().view(-1).view(torch.uint8)))
        leaves[name] = leaf
    return leaves


def save_trained(*, folder: Path, layout: str) -> dict[str, Any]:
    """Every leaf of the states saved, one checkpoint a dtype."""
    saved = {}
    for dtype in DTYPES:
        state = trained(layout, dtype=dtype, steps=2)
        grouped(folder / str(dtype)).save(2, state, progress=PROGRESS)
        saved[str(dtype)] = full(state)
    return saved


def load_trained(*, folder: Path, layouts: list[str]) -> list[tuple[dict[str, Any], list[Any]]]:
    """For every layout, every leaf of the states loaded over other values, and the progress."""
    results = []
    for layout in layouts:
        loaded, progress = {}, []
        for dtype in DTYPES:
            state = trained(layout, dtype=dtype, steps=0)
            progress.append(grouped(folder / str(dtype)).restore(state))
            loaded[str(dtype)] = full(state)
        results.append((loaded, progress))
    return results


@pytest.mark.parametrize(
    "writers, readers",
    [
        (("plain", 1), {1: ["plain"], 2: ["fsdp"]}),
        (("fsdp", 2), {1: ["plain", "fsdp"], 2: ["fsdp", "plain"], 4: ["fsdp", "hsdp"]}),
        (("fsdp", 4), {1: ["plain"], 2: ["fsdp"]}),
        (("hsdp", 4), {1: ["plain"], 2: ["fsdp"], 4: ["hsdp"]}),
    ],
    ids=["one", "two", "four", "two_by_two"],
)
def test_state_is_bitwise_equal_in_every_layout(tmp_path, writers, readers):
    layout, size = writers
    saved = run(save_trained, world_size=size, folder=tmp_path, layout=layout)
    assert all(state == saved[0] for state in saved)
    for size, layouts in readers.items():
        for rank in run(load_trained, world_size=size, folder=tmp_path, layouts=layouts):
            assert len(rank) == len(layouts)
            for loaded, progress in rank:
                assert loaded == saved[0]
                assert progress == [PROGRESS] * len(DTYPES)


def small_state(fill_value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"up.weight": torch.full((4, 3), fill_value), "bias": torch.full((5,), fill_value)},
        "optimizer": {"state": {"up.weight": {"step": torch.tensor(fill_value)}}, "groups": [{"betas": (0.9, 0.95)}]},
    }


def test_values_and_tuples_come_back_as_they_were(tmp_path):
    alone(tmp_path).save(1, small_state(), progress={"step": 1})
    state = small_state(0.0)
    state["optimizer"]["groups"][0]["betas"] = (0.0, 0.0)
    assert alone(tmp_path).restore(state) == {"step": 1}
    assert state["optimizer"]["groups"] == [{"betas": (0.9, 0.95)}]
    assert full(state) == full(small_state())


def test_flatten_and_fill_name_leaves_by_place():
    state = {"a": {"b": 1}, "c": [2, (3, {"d": None})]}
    assert flatten(state) == {"a.b": 1, "c.0": 2, "c.1.0": 3, "c.1.1.d": None}
    assert fill(state, values={"a.b": 5, "c.0": 6, "c.1.0": 7, "c.1.1.d": 8}) == {
        "a": {"b": 5},
        "c": [6, (7, {"d": 8})],
    }


def test_tensors_are_read_one_by_one_without_a_process_group(tmp_path):
    saved = run(save_trained, world_size=2, folder=tmp_path, layout="fsdp")[0]["torch.bfloat16"]
    tensors = read_tensors(tmp_path / "torch.bfloat16" / "step-00000002", under="model")
    assert set(tensors) == {"up.weight", "up.bias", "down.weight", "down.bias", "balance_bias"}
    assert full({"model": dict(tensors)}) == {name: saved[name] for name in saved if name.startswith("model.")}
    assert str(tensors.kinds["up.weight"]) == "[17, 12] bfloat16"


def test_only_the_newest_checkpoints_stay(tmp_path):
    checkpoints = alone(tmp_path, keep=2)
    for step in (1, 2, 3, 100_000_000):
        checkpoints.save(step, small_state(), progress={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]
    assert checkpoints.latest() == tmp_path / "step-100000000"


def test_keep_0_keeps_all(tmp_path):
    for step in (1, 2, 3):
        alone(tmp_path, keep=0).save(step, small_state(), progress={})
    assert len(list(tmp_path.iterdir())) == 3


def test_leftovers_of_killed_runs_do_not_count_and_go(tmp_path):
    alone(tmp_path).save(1, small_state(), progress={})
    for name in (".step-00000002.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    assert alone(tmp_path).latest() == tmp_path / "step-00000001"
    alone(tmp_path).save(2, small_state(), progress={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_auto_skips_a_checkpoint_that_is_not_whole_and_says_so(tmp_path, caplog):
    for step in (1, 2):
        alone(tmp_path).save(step, small_state(), progress={"step": step})
    os.truncate(next((tmp_path / "step-00000002").glob("*.distcp")), 10)
    assert alone(tmp_path).restore(small_state()) == {"step": 1}
    assert "skipped" in caplog.text and "10 bytes" in caplog.text
    assert (tmp_path / "replaced-1" / "step-00000002").is_dir()


def test_starting_further_back_sets_later_checkpoints_aside(tmp_path):
    for step in (1, 2, 3):
        alone(tmp_path).save(step, small_state(float(step)), progress={"step": step})
    assert alone(tmp_path, resume=str(tmp_path / "step-00000002")).restore(small_state()) == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replaced-1", "step-00000001", "step-00000002"]
    assert alone(tmp_path, resume="never").restore(small_state()) is None
    assert alone(tmp_path).latest() is None
    assert sorted(path.name for path in (tmp_path / "replaced-2").iterdir()) == ["step-00000001", "step-00000002"]


def test_nothing_to_resume_is_none(tmp_path):
    assert alone(tmp_path / "absent").restore(small_state()) is None
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("resume", ["step-00000001", "sometimes"])
def test_resume_from_no_checkpoint_is_one_line(tmp_path, resume):
    with pytest.raises(CheckpointError, match=f"checkpoint.resume=.*{resume}: must be auto, never or a step-"):
        alone(tmp_path, resume=str(tmp_path / resume)).restore(small_state())


def damage(name: str, folder: Path) -> str:
    """Damage a checkpoint; the name of the file that an error has to name."""
    data = next(folder.glob("__0_*.distcp"))
    content = bytearray(data.read_bytes())
    if name == "flipped byte":
        content[len(content) // 2] ^= 0x40
        data.write_bytes(content)
    if name == "truncated file":
        data.write_bytes(content[:-1])
    if name == "missing file":
        data.unlink()
    if name == "flipped byte in the manifest":
        data = folder / "manifest.json"
        data.write_bytes(data.read_bytes().replace(b'"tokens": 96', b'"tokens": 86'))
    if name == "cut manifest":
        data = folder / "manifest.json"
        data.write_bytes(data.read_bytes()[:-20])
    if name == "flipped byte in the contents":
        data = folder / ".metadata"
        content = bytearray(data.read_bytes())
        content[10] ^= 1
        data.write_bytes(content)
    return data.name


DAMAGES = [
    "flipped byte",
    "truncated file",
    "missing file",
    "flipped byte in the manifest",
    "cut manifest",
    "flipped byte in the contents",
]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_that_names_the_file(tmp_path, name):
    path = alone(tmp_path).save(3, small_state(), progress=PROGRESS)
    file = damage(name, path)
    state = small_state(0.0)
    with pytest.raises(CheckpointError, match=file) as error:
        alone(tmp_path).load(path, state)
    assert "\n" not in str(error.value)
    assert full(state) == full(small_state(0.0)), "nothing is read from a damaged checkpoint"
    with pytest.raises(CheckpointError, match=file):
        read_tensors(path)


def save_once(*, folder: Path) -> None:
    grouped(folder).save(3, trained("fsdp", dtype=torch.float32, steps=1), progress=PROGRESS)


def load_error(*, folder: Path) -> str:
    state = trained("fsdp", dtype=torch.float32, steps=0)
    with pytest.raises(CheckpointError) as error:
        grouped(folder).load(folder / "step-00000003", state)
    return str(error.value)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_damage_is_the_same_error_on_all_ranks(tmp_path, file):
    run(save_once, world_size=2, folder=tmp_path)
    path = tmp_path / "step-00000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    errors = run(load_error, world_size=2, folder=tmp_path)
    assert errors[0] == errors[1]
    assert file in errors[0] and "damaged" in errors[0]


@pytest.mark.parametrize(
    "about, difference",
    [
        ({"model": {"d_model": 16, "cycle": ["moe"]}, "tokenizer": "5e1f"}, "model.d_model is 12, not 16"),
        ({"model": {"d_model": 12, "cycle": ["mlp"]}, "tokenizer": "5e1f"}, 'model.cycle.0 is "moe", not "mlp"'),
        ({"model": {"d_model": 12, "cycle": ["moe"], "n_mtp": 1}, "tokenizer": "5e1f"}, "model.n_mtp is absent, not 1"),
        ({"model": {"d_model": 12, "cycle": ["moe"]}}, 'tokenizer is "5e1f", not absent'),
    ],
)
def test_another_model_is_one_line_with_both_values(tmp_path, about, difference):
    path = alone(tmp_path).save(1, small_state(), progress={})
    with pytest.raises(CheckpointError) as error:
        alone(tmp_path, about=about).load(path, small_state())
    assert str(error.value) == f"checkpoint {path} is of another model: {difference}"


def change(name: str, state: dict[str, Any]) -> str:
    """Change a state; what an error has to say."""
    model = state["model"]
    if name == "missing":
        model["gate.weight"] = torch.zeros(2)
        return "has no model.gate.weight, which is in this run's state"
    if name == "extra":
        del model["bias"]
        return "has model.bias, which is not in this run's state"
    if name == "shape":
        model["up.weight"] = torch.zeros(4, 4)
        return "holds model.up.weight as [4, 3] float32, this run as [4, 4] float32"
    if name == "dtype":
        model["bias"] = torch.zeros(5, dtype=torch.bfloat16)
        return "holds model.bias as [5] float32, this run as [5] bfloat16"
    state["optimizer"]["groups"].append({"betas": (0.9, 0.95)})
    return "has no optimizer.groups.1.betas.0, which is in this run's state"


@pytest.mark.parametrize("name", ["missing", "extra", "shape", "dtype", "value"])
def test_other_tensors_are_one_line_that_names_the_tensor(tmp_path, name):
    path = alone(tmp_path).save(1, small_state(), progress={})
    state = small_state(0.0)
    expected = change(name, state)
    with pytest.raises(CheckpointError) as error:
        alone(tmp_path).load(path, state)
    assert str(error.value) == f"checkpoint {path} {expected}"


class Trap:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_contents_with_foreign_classes_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = alone(tmp_path).save(1, small_state(), progress={})
    facts = manifest.read(path)
    (path / ".metadata").write_bytes(pickle.dumps(Trap()))
    facts.files.update(manifest.fingerprint(path, names=[".metadata"]))
    facts.write(path)
    with pytest.raises(CheckpointError, match="mkdir"):
        read_tensors(path)
    assert not (tmp_path / "trapped").exists()


def save_on_a_full_disk(*, folder: Path, full_rank: int) -> str:
    """Save once, then again where one rank may not write more than 8 kB to a file."""
    state = {"model": {"weight": torch.ones(20_000), "other": torch.ones(20_000)}}
    checkpoints = grouped(folder)
    checkpoints.save(1, state, progress={})
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, state, progress={})
    return str(error.value)


@pytest.mark.parametrize("world_size, full_rank", [(1, 0), (2, 0), (2, 1)])
def test_full_disk_is_one_line_on_all_ranks_and_older_checkpoints_stay(tmp_path, world_size, full_rank):
    errors = run(save_on_a_full_disk, world_size=world_size, folder=tmp_path, full_rank=full_rank)
    assert all(error == errors[0] for error in errors)
    assert errors[0] == f"cannot write checkpoint {tmp_path / 'step-00000002'}: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    manifest.read(tmp_path / "step-00000001")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint .*: File exists"):
        alone(tmp_path / "checkpoints").save(1, small_state(), progress={})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": -1}, "checkpoint.every=-1: must be 0 or more"),
        ({"keep": -1}, "checkpoint.keep=-1: must be 0 or more"),
        ({"resume": ""}, "checkpoint.resume=: must be auto, never or a folder"),
        ({"resume": "x", "init": "y"}, "checkpoint.init=y: must be null where checkpoint.resume is a folder"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**{"every": 1, "keep": 1, "resume": "auto", "init": None, **changes})
