"""What a folder says of itself, and lies about."""

import json

import pytest

from data.errors import DataError
from data.manifest import read_manifest


@pytest.fixture
def folder(make_shards, texts, tmp_path):
    make_shards(texts, validation=0.2, shard_tokens=500)
    return tmp_path / "shards"


def change(folder, **changed):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_a_manifest_counts_what_is_there(folder, texts):
    manifest = read_manifest(folder)
    splits = manifest.splits
    assert splits["train"].documents + splits["validation"].documents == len(texts)
    assert splits["train"].text_bytes + splits["validation"].text_bytes == sum(map(len, texts))
    for split in splits.values():
        assert split.tokens == split.text_bytes + split.documents
        assert split.documents > 20
        for shard in split.shards:
            assert (folder / f"{shard.name}.bin").stat().st_size == 2 * shard.tokens
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.eos == 256


def test_a_folder_without_a_manifest_is_not_whole(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no whole corpus \(manifest\.json is missing\); python -m data\.prepare"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, r"manifest\.json: format=2: must be 1"),
        ({"dtype": "int8"}, r"manifest\.json: dtype=int8: must be one of uint16, uint32"),
        ({"splits": {}}, r"manifest\.json: splits=\[\]: must be train, validation"),
        ({"splits": 3}, r"manifest\.json: is damaged: AttributeError"),
        ({"tokenizer": {"kind": "x"}}, r"manifest\.json: is damaged: TypeError"),
        ({"surplus": 1}, r"manifest\.json: is damaged: TypeError .*surplus"),
    ],
)
def test_a_wrong_manifest_is_refused(folder, changed, message):
    change(folder, **changed)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


def test_a_manifest_whose_sums_are_wrong_is_refused(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["shards"][0]["tokens"] += 1
    change(folder, splits=splits)
    with pytest.raises(DataError, match=r"the totals of train are not the sums of its shards"):
        read_manifest(folder)


def test_a_manifest_that_breaks_off_is_refused(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"manifest\.json: is damaged"):
        read_manifest(folder)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: format=None: must be 1"):
        read_manifest(folder)
