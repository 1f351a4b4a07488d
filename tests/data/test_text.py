"""Readers of files."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.text import FileSource


def read(path, *, start=0, pattern="*", text_key="text"):
    return [(d.number, d.text) for d in FileSource(str(path), pattern=pattern, text_key=text_key).documents(start)]


def jsonl(texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)


@pytest.fixture
def folder(tmp_path):
    """Nine documents in every format, in the order of their paths."""
    root = tmp_path / "corpus"
    (root / "b" / ".hidden").mkdir(parents=True)
    (root / "b" / ".hidden" / "no.txt").write_text("hidden")
    (root / "a.txt").write_bytes("0 crlf\r\nand é".encode())
    (root / "b" / "one.jsonl").write_text(jsonl(["1", "2"]) + "\n" + jsonl(["4"]))
    (root / "b" / "two.jsonl.gz").write_bytes(gzip.compress(jsonl(["5"]).encode()))
    table = pyarrow.table({"text": ["6", "7", "8"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, root / "c.parquet", row_group_size=2)
    (root / "d.md.gz").write_bytes(gzip.compress(b"9"))
    return root


EXPECTED = ["0 crlf\r\nand é", "1", "2", "", "4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize("start", range(11))
def test_a_folder_is_read_in_order_from_any_document_on(folder, start):
    assert read(folder, start=start) == list(enumerate(EXPECTED))[start:]


def test_one_file_a_name_pattern_and_a_path_pattern_are_read(folder):
    assert read(folder / "b" / "one.jsonl") == [(0, "1"), (1, "2"), (2, ""), (3, "4")]
    assert read(folder, pattern="*.gz") == [(0, "5"), (1, "9")]
    assert read(f"{folder}/*/*.gz") == [(0, "5")]


def test_another_key_is_read_on_request(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "b", "text": "t"}\n')
    assert read(path, text_key="body") == [(0, "b")]


def test_skipped_documents_are_not_decoded(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xff\n{"text": "good"}\n')
    assert read(path, start=1) == [(1, "good")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"ab\xffc", r"x\.txt: is not UTF-8 at byte 2 \(0xff\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x\.jsonl: is not UTF-8 at byte 24 \(0xe9\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl:2: is not JSON"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', r"text_key=text: must be a key of .*x\.jsonl:1, one of body, id"),
        ("x.jsonl", b'{"text": null}\n', r"x\.jsonl:1: text is a NoneType: must be a text"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: is a list: must be an object with the key text"),
        ("x.txt.gz", gzip.compress(b"a" * 99)[:-9], r"x\.txt\.gz: cannot be read: Compressed file ended"),
        ("x.txt.gz", b"no gzip", r"x\.txt\.gz: cannot be read: Not a gzipped file"),
        ("x.parquet", b"no parquet at all", r"x\.parquet: cannot be read: Parquet magic bytes not found"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_or_with_a_gap_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"x\.parquet: row 1: text is a NoneType"):
        read(path)
    with pytest.raises(DataError, match=r"text_key=body: must be a column of .*x\.parquet, one of text"):
        read(path, text_key="body")


def test_a_source_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"source=.*none: must be a file, a folder"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no files named \*\.txt"):
        read(tmp_path, pattern="*.txt")
    with pytest.raises(DataError, match=r"has no files"):
        read(f"{tmp_path}/*.txt")


def test_a_source_is_recognised_by_its_files_not_by_the_way_to_them(folder, monkeypatch):
    settings = FileSource(str(folder), pattern="*", text_key="text").settings
    monkeypatch.chdir(folder.parent)
    assert FileSource("./corpus", pattern="*", text_key="text").settings == settings
    (folder / "a.txt").write_text("longer than it was before")
    assert FileSource("./corpus", pattern="*", text_key="text").settings != settings
