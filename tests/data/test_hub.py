"""Documents of Hugging Face datasets."""

import json

import pytest

from data.config import HubConfig
from data.errors import DataError
from data.hub import HubSource


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(7)))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("start", [0, 5])
def test_rows_are_read_from_any_number_on(file, streaming, start):
    source = HubSource("json", config=HubConfig(data_files=str(file), streaming=streaming), text_key="text")
    expected = [(number, f"row {number}") for number in range(7)][start:]
    assert [(document.number, document.text) for document in source.documents(start)] == expected


def test_an_unknown_dataset_split_or_key_is_one_line(file, tmp_path):
    for name, config in (
        ("json", HubConfig(data_files=str(file), split="test")),
        (str(tmp_path / "nothing"), HubConfig()),
        ("json", HubConfig(data_files=str(tmp_path / "nothing.jsonl"))),
    ):
        with pytest.raises(DataError, match=r"source=hf:.* cannot be loaded: ") as caught:
            HubSource(name, config=config, text_key="text")
        assert "\n" not in str(caught.value)
    source = HubSource("json", config=HubConfig(data_files=str(file), streaming=True), text_key="body")
    with pytest.raises(DataError, match=r"text_key=body: must be a key of row 0 of hf:json, one of text"):
        next(source.documents(0))


def test_a_row_that_breaks_off_while_streaming_is_one_line(file):
    file.write_text('{"text": "a"}\n{"text": \n')
    source = HubSource("json", config=HubConfig(data_files=str(file), streaming=True), text_key="text")
    with pytest.raises(DataError, match=r"hf:json: row 0 cannot be read: "):
        list(source.documents(0))
