"""Every fault of a checkpoint is one line, the same on all ranks, and nothing half done counts."""

import io
import os
import pickle
import resource
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from saving import PROGRESS, alone, full, grouped, small_state, trained

from trainer import manifest, stored
from trainer.config import CheckpointConfig
from trainer.manifest import CheckpointError
from trainer.stored import read_tensors


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


class Attribute:
    """Unpickled, it would be a method that changes the disk."""

    def __reduce__(self) -> Any:
        return getattr, (Path, "mkdir")


def replace_contents(path: Path, content: bytes) -> None:
    """Another table of contents, whose checksum agrees."""
    facts = manifest.read(path)
    (path / ".metadata").write_bytes(content)
    facts.files.update(manifest.fingerprint(path, names=[".metadata"]))
    facts.write(path)


@pytest.mark.parametrize("trap", [Trap(), Attribute()])
def test_contents_with_foreign_classes_run_no_code(tmp_path, monkeypatch, trap):
    monkeypatch.chdir(tmp_path)
    path = alone(tmp_path).save(1, small_state(), progress={})
    replace_contents(path, pickle.dumps(trap))
    with pytest.raises(CheckpointError, match="mkdir"):
        read_tensors(path)
    assert not (tmp_path / "trapped").exists()


class _EarlyPython(pickle.Pickler):
    """Pickles members of an Enum by name, as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_contents_that_an_early_python_3_11_wrote_are_read(tmp_path):
    path = alone(tmp_path).save(1, small_state(), progress={})
    file = io.BytesIO()
    _EarlyPython(file).dump(stored.read_contents(path))
    assert b"getattr" in file.getvalue()
    replace_contents(path, file.getvalue())
    state = small_state(0.0)
    alone(tmp_path).load(path, state)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in small_state()["model"].items())


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
