"""Folders of safetensors files: what an index may say, and where a folder may be written."""

import json
from pathlib import Path

import pytest
import torch
from models import compose, randomized

from zoo import hf
from zoo.decoder import Decoder
from zoo.hf_files import tokenizer_files

SMALL = compose("llama3_tiny", d_model=32, n_layers=2, vocab_size=64, blocks__dense__mlp__d_ff=48)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, "weight_map=null: must be an object of keys and files"),
        ({"weight_map": []}, "weight_map=[]: must be an object of keys and files"),
        ({"weight_map": {}}, "weight_map={}: must be an object of keys and files, of one at least"),
        ({"weight_map": {"a": 3}}, "a=3: must be a .safetensors file of the same folder"),
        ({"weight_map": {"a": ["x"]}}, 'a=["x"]: must be a .safetensors file of the same folder'),
        ({"weight_map": {"a": "../x/model.safetensors"}}, "must be a .safetensors file of the same folder"),
        ({"weight_map": {"a": "/x/model.safetensors"}}, "must be a .safetensors file of the same folder"),
        ({"weight_map": {"a": ".."}}, 'a="..": must be a .safetensors file of the same folder'),
        ({"weight_map": {"a": "config.json"}}, "must be a .safetensors file of the same folder"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, ".safetensors: "),
        ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors: no such file"),
        ({"weight_map": {"a": "model.safetensors"}}, "model.safetensors: lacks a, which"),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(tmp_path, index, message):
    hf.save(randomized(SMALL, seed=0), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(hf.HFError) as caught:
        hf.load(tmp_path / "out")
    assert message in str(caught.value)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_nested_beyond_reading_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(hf.HFError, match="config.json: cannot be read"):
        hf.load(tmp_path)


def test_a_folder_is_written_where_one_stands_and_behind_a_link(tmp_path, monkeypatch):
    first, second = (randomized(SMALL, seed=seed) for seed in (1, 2))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    hf.save(first, ".")
    assert holds(tmp_path / "out", first)
    (tmp_path / "link").symlink_to("out")
    hf.save(second, tmp_path / "link", replace=True)
    assert holds(tmp_path / "out", second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "adapter_model.safetensors", "src", "model.part0", "link"])
def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path, foreign):
    first, second = (randomized(SMALL, seed=seed) for seed in (1, 2))
    run = tmp_path / "botchan.model"
    run.write_text("pieces")
    for name in ("tokenizer.json", "tokenization_kimi.py", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    files = [run, *tokenizer_files(tmp_path)]
    hf.save(first, tmp_path / "out", tokenizer=files)
    hf.save(second, tmp_path / "out", tokenizer=files, replace=True)
    assert holds(tmp_path / "out", second)
    place = tmp_path / "out" / foreign
    if foreign == "src":
        (place / "deep").mkdir(parents=True)
    elif foreign == "link":
        place = tmp_path / "out" / "tokenizer.json"
        place.unlink()
        place.symlink_to(run)
    else:
        place.write_text("years of work")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(hf.HFError) as caught:
        hf.save(first, tmp_path / "out", tokenizer=files, replace=True)
    assert f"out: holds {place.name}, which no export writes: must be a new folder" in str(caught.value)
    assert holds(tmp_path / "out", second)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert len(list(tmp_path.iterdir())) == 5


def test_a_file_that_comes_while_a_folder_is_written_is_not_lost(tmp_path):
    model = randomized(SMALL, seed=0)
    hf.save(model, tmp_path / "out")
    state = model.state_dict()

    def get(name: str) -> torch.Tensor:
        (tmp_path / "out" / "notes.txt").write_text("of just now")
        return state[name]

    with pytest.raises(hf.HFError, match="holds notes.txt"):
        hf.write(SMALL, get, folder=tmp_path / "out", replace=True)
    assert (tmp_path / "out" / "notes.txt").exists() and holds(tmp_path / "out", model)


def holds(folder: Path, model: Decoder) -> bool:
    stored = hf.load(folder).state_dict()
    return all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
