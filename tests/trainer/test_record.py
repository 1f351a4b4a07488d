"""A run's folder: whole files, this run's tokenizer and no other."""

import os

import pytest
from omegaconf import OmegaConf

from trainer import record as module
from trainer.record import record, whole


def test_settings_and_tokenizer_are_kept(tmp_path):
    file = tmp_path / "bpe.model"
    file.write_bytes(b"pieces")
    record(tmp_path / "run", settings={"seed": 3}, tokenizer=[file], rank=0)
    assert OmegaConf.load(tmp_path / "run" / "run.yaml") == {"seed": 3}
    assert (tmp_path / "run" / "tokenizer" / "bpe.model").read_bytes() == b"pieces"
    record(tmp_path / "other", settings={}, tokenizer=[file], rank=1)
    assert not (tmp_path / "other").exists()


def test_files_of_another_tokenizer_go(tmp_path):
    files = [tmp_path / name for name in ("old.model", "new.json")]
    for file in files:
        file.write_bytes(file.name.encode())
        record(tmp_path / "run", settings={}, tokenizer=[file], rank=0)
        (tmp_path / "run" / "tokenizer" / ".half").write_text("left by a kill")
    record(tmp_path / "run", settings={}, tokenizer=files[1:], rank=0)
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == ["new.json"]


@pytest.mark.parametrize("name", ["run.yaml", "tokenizer/bpe.model"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, name):
    file, run = tmp_path / "bpe.model", tmp_path / "run"
    file.write_bytes(b"old")
    record(run, settings={"seed": 3}, tokenizer=[file], rank=0)
    before = (run / name).read_bytes()
    file.write_bytes(b"new")
    replace = os.replace

    def refuse(partial, path):
        if path == run / name:
            raise OSError(28, "No space left on device")
        replace(partial, path)

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(OSError) as refused:
        record(run, settings={"seed": 4}, tokenizer=[file], rank=0)
    assert str(refused.value) == f"cannot write {run / name}: No space left on device"
    assert (run / name).read_bytes() == before
    assert not [path for path in run.rglob(".*")]


def test_what_is_interrupted_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "plots").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/plots/loss.png: "), whole(tmp_path / "plots/loss.png"):
        pass
