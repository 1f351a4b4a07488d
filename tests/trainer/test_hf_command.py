"""``python -m trainer.hf``: what it carries, and that it loses nothing whether it ends well or not."""

import json
from pathlib import Path

import pytest
from models import compose, randomized

from trainer import hf as command
from trainer import manifest
from trainer.manifest import CheckpointError
from trainer.stored import read_tensors
from zoo import hf

SMALL = compose("llama3_tiny", d_model=32, n_layers=2, vocab_size=64, blocks__dense__mlp__d_ff=48)
CARRIED = {"tokenizer.json": "{}", "tokenization_kimi.py": "pass", "preprocessor_config.json": "[]"}


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of Hugging Face's, with a file that nobody asked for."""
    folder = tmp_path / "source"
    hf.save(randomized(SMALL, seed=0), folder, bos=1, eos=[2, 3])
    for name, content in CARRIED.items():
        (folder / name).write_text(content)
    (folder / "LICENSE").write_text("free")
    return folder


def run(capsys, *words: object) -> str:
    """The one line that a refused command leaves."""
    assert command.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_tokens_and_the_tokenizers_files_survive_an_import_and_an_export(tmp_path, source):
    checkpoint, out = tmp_path / "run" / "step-00000000", tmp_path / "out"
    assert command.main(["import", str(source), str(checkpoint)]) == 0
    assert command.main(["export", str(checkpoint), str(out)]) == 0
    assert {name: (out / name).read_text() for name in CARRIED} == CARRIED
    assert not (out / "LICENSE").exists()
    raw = json.loads((out / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, [2, 3])
    assert raw == json.loads((source / "config.json").read_text())
    assert command.main(["export", str(checkpoint), str(out)]) == 0  # over its own work


def test_the_tokenizers_files_are_part_of_the_whole_checkpoint(tmp_path, source):
    checkpoint = tmp_path / "run" / "step-00000000"
    command.import_checkpoint(source, checkpoint)
    assert {f"tokenizer/{name}" for name in CARRIED} < manifest.read(checkpoint).files.keys()
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer.json is damaged"):
        read_tensors(checkpoint)
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer.json is missing"):
        manifest.read(checkpoint)


def test_an_export_replaces_nothing_but_an_export(tmp_path, source, capsys):
    checkpoint, project = tmp_path / "run" / "step-00000000", tmp_path / "project"
    command.import_checkpoint(source, checkpoint)
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "a.py").write_text("years of work")
    assert "holds src, which no export writes" in run(capsys, "export", checkpoint, project)
    assert (project / "src" / "a.py").read_text() == "years of work"
    assert "holds LICENSE, which no export writes" in run(capsys, "export", checkpoint, source)
    assert (source / "LICENSE").exists()


def test_an_import_onto_what_is_there_moves_nothing(tmp_path, source, capsys):
    checkpoint = tmp_path / "run" / "step-00000000"
    command.import_checkpoint(source, checkpoint)
    before = manifest.read(checkpoint)
    assert f"{checkpoint}: exists: must be a new folder" in run(capsys, "import", source, checkpoint)
    assert manifest.read(checkpoint) == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000000"]


@pytest.mark.parametrize("fault", ["dangling", "folder", "unreadable", "tokens", "cut"])
def test_a_failed_import_leaves_no_checkpoint(tmp_path, source, capsys, monkeypatch, fault):
    tokenizer, message = source / "tokenizer.json", "tokenizer.json: must be a file"
    tokenizer.unlink()
    if fault == "dangling":
        tokenizer.symlink_to(tmp_path / "nowhere")
    elif fault == "folder":
        tokenizer.mkdir()
    elif fault == "unreadable":
        tokenizer.symlink_to("/proc/self/mem")  # open succeeds, reading does not
        message = "cannot write checkpoint"
    elif fault == "tokens":
        raw = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(raw | {"eos_token_id": "</s>"}))
        message = 'config.json: eos_token_id="</s>": must be a token\'s number, or a list of them'
    else:
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        message = "model.safetensors: is no whole safetensors file"
    assert message in run(capsys, "import", source, tmp_path / "run" / "step-00000001")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
