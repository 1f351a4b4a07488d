"""The command line, and the embedded corpus."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from data.config import DataConfig, Kind
from data.errors import DataError
from data.files import locked
from data.manifest import read_manifest
from data.prepare import ensure, main, parse, prepare, unigram_entropy
from data.source import ShardSource
from data.tokenizer import open_tokenizer


@pytest.fixture
def source(tmp_path, texts):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "", texts[0]]))
    return path


@pytest.fixture
def arguments(source, tmp_path, byte_ranks):
    out = tmp_path / "out"
    return [f"source={source}", f"out={out}", "tokenizer.kind=tiktoken", f"tokenizer.file={byte_ranks}"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library."""
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    (root / "test" / "test_it.py").write_text("left out")
    for number in range(60):
        (root / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * (number + 1))
    (root / "old.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
    monkeypatch.setattr("data.stdlib.sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def embedded(tmp_path, **changed):
    return DataConfig(folder=str(tmp_path / "embedded"), **{"vocab_size": 320, "validation": 0.2, **changed})


def test_the_command_line_prepares_and_says_what_it_made(arguments, texts, tmp_path, capsys):
    assert main([*arguments, "validation=0.25"]) == 0
    out, err = capsys.readouterr()
    manifest = read_manifest(tmp_path / "out")
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert f"{train.tokens:,} training tokens in {train.documents} documents" in out
    assert f"unigram entropy {manifest.unigram_entropy:.4f} nats" in out
    assert "documents" in err and "tokens/s" in err
    assert train.documents + validation.documents == len(texts) + 1  # the empty one is left out
    assert not (tmp_path / "out" / "progress.json").exists()


def test_the_same_command_again_changes_nothing(arguments, tmp_path):
    assert main(arguments) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main([*arguments, "threads=2"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_unigram_entropy_equals_a_plain_count(arguments, texts, tmp_path):
    main(arguments)
    counts = Counter(token for text in [*texts, texts[0]] for token in [*text.encode(), 256])
    total = sum(counts.values())
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert read_manifest(tmp_path / "out").unigram_entropy == pytest.approx(expected, rel=1e-14)
    assert unigram_entropy(np.array([5, 0, 5])) == pytest.approx(math.log(2))


def test_validation_depends_on_the_text_alone(tmp_path, texts, make_shards):
    def held_out(name, texts):
        folder = make_shards(texts, name=name, validation=0.3, shard_tokens=700).folder
        source = ShardSource(folder, split="validation", seq_len=1, n_lookahead=1, seed=0)
        rows = source.read(np.arange(source.n_windows, dtype=np.uint64))
        return sorted(bytes(t if t < 256 else 0 for t in rows.tokens[:, 0].tolist()).split(b"\0"))

    assert len(held_out("a", texts)) > 30
    assert held_out("a", texts) == held_out("b", texts[::-1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["sorce=x"], "sorce: is not a key: did you mean source?"),
        (["wobble=x"], "wobble: is not a key: must be one of source, out"),
        (["hub.token=x"], "hub.token: is not a key"),
        (["source"], "source: must be key=value"),
        (["validation=many"], "validation: Value 'many'"),
        (["validation=1.5"], "validation=1.5: must be from 0 to below 1"),
        (["validation=0.999999"], "validation=0.999999: must be lower: it took every document"),
        (["tokenizer.kind=bpe"], "tokenizer.kind: Invalid value 'bpe'"),
        (["tokenizer.file=none"], "none: cannot be read: No such file"),
        (["tokenizer.eos=<end>"], "tokenizer.eos=<end>: must name the token"),
        (["source=none"], "source=none: must be a file, a folder"),
        (["text_key=body"], "text_key=body: must be a key of"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, changed, message, capsys):
    assert main([*arguments, *changed]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.prepare: ")]
    assert len(err) == 1 and message in err[0]


def test_help_is_shown_with_and_without_being_asked(capsys):
    assert main(["--help"]) == 0
    assert "usage: python -m data.prepare source=" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: python -m data.prepare source=" in capsys.readouterr().err


def test_the_module_runs_and_ends_with_status_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.prepare", "source=none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "data.prepare: out=None: must be a folder to make\n"


def test_an_empty_source_makes_nothing(tmp_path, arguments, source, capsys):
    source.write_text('{"text": ""}\n\n')
    assert main(arguments) == 2
    assert "holds no text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unreadable_text_is_named_and_mending_it_continues(tmp_path, arguments, source, capsys):
    good = source.read_bytes()
    source.write_bytes(good[:-4] + b'\xff"}\n')
    assert main([*arguments, "shard_tokens=800"]) == 2
    assert f"text.jsonl: is not UTF-8 at byte {len(good) - 4} (0xff)" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(DataError, match="no whole corpus"):
        read_manifest(tmp_path / "out")
    source.write_bytes(good)
    assert main([*arguments, "shard_tokens=800"]) == 0


def test_a_folder_with_other_files_or_inside_the_source_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert main(arguments) == 2
    assert "must be new or empty: it holds thesis.txt" in capsys.readouterr().err
    assert main([*arguments, f"source={tmp_path}"]) == 2
    assert "must lie outside source=" in capsys.readouterr().err


def test_another_process_in_the_folder_is_noticed(arguments, tmp_path, capsys):
    with locked(tmp_path / "out", wait=False):
        assert main(arguments) == 2
    assert "out: another process is preparing it" in capsys.readouterr().err
    assert main(arguments) == 0


def test_whole_shards_are_not_taken_for_those_of_other_settings(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert main([*arguments, "validation=0.1"]) == 2
    assert "validation=0.1: must be 0.005, with which" in capsys.readouterr().err
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    assert main(arguments) == 2
    assert "train-00000.bin: the shard has 0 bytes" in capsys.readouterr().err


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, byte_ranks, source):
    settings = byte_ranks.with_name(byte_ranks.name + ".json")
    settings.write_text(json.dumps({"pattern": r"(?s:.)", "special_tokens": {"<|endoftext|>": 70_000}}))
    arguments = [f"source={source}", f"out={tmp_path / 'out'}", "tokenizer.kind=tiktoken"]
    prepare(parse([*arguments, f"tokenizer.file={byte_ranks}"]))
    assert read_manifest(tmp_path / "out").dtype == "uint32"
    rows = ShardSource(str(tmp_path / "out"), split="train", seq_len=500, n_lookahead=1, seed=0)
    assert 70_000 in rows.read(np.arange(1, dtype=np.uint64)).tokens


def test_the_embedded_corpus_is_prepared_once(tmp_path, library, capsys):
    ensure(embedded(tmp_path))
    manifest = read_manifest(tmp_path / "embedded")
    assert manifest.tokenizer.vocab_size == 320
    assert sum(split.documents for split in manifest.splits.values()) == 61
    assert "61 files" in manifest.source
    before = (tmp_path / "embedded" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    ensure(embedded(tmp_path))
    assert (tmp_path / "embedded" / "manifest.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


def test_the_embedded_corpus_follows_the_interpreter(tmp_path, library, capsys):
    ensure(embedded(tmp_path))
    before = read_manifest(tmp_path / "embedded")
    (library / "new.py").write_text("pass\n")
    ensure(embedded(tmp_path))
    after = read_manifest(tmp_path / "embedded")
    assert before.settings["corpus_sha256"] != after.settings["corpus_sha256"]
    assert "62 files" in after.source
    assert "prepared anew: it is of another Python's standard library" in capsys.readouterr().err


def test_an_unfinished_embedded_corpus_of_another_interpreter_is_begun_anew(tmp_path, library):
    ensure(embedded(tmp_path))
    folder = tmp_path / "embedded"
    settings = read_manifest(folder).settings
    (folder / "manifest.json").unlink()
    progress = {"format": 1, "settings": settings, "n_documents": 0, "shards": {"train": [], "validation": []}}
    (folder / "progress.json").write_text(json.dumps({**progress, "counts": "eJwDAAAAAAE="}))
    (library / "new.py").write_text("pass\n")
    ensure(embedded(tmp_path))
    assert "62 files" in read_manifest(folder).source


def test_an_embedded_corpus_that_lost_a_shard_is_made_again(tmp_path, library, capsys):
    ensure(embedded(tmp_path))
    shard = tmp_path / "embedded" / "train-00000.bin"
    content = shard.read_bytes()
    shard.unlink()
    ensure(embedded(tmp_path))
    assert shard.read_bytes() == content
    assert "prepared anew: " in capsys.readouterr().err


def test_the_embedded_corpus_is_not_replaced_by_one_of_other_settings(tmp_path, library):
    ensure(embedded(tmp_path))
    with pytest.raises(DataError, match=r"vocab_size=330: must be 320, with which .* was prepared; give that, choose"):
        ensure(embedded(tmp_path, vocab_size=330))


def test_the_sources_of_other_codings_are_decoded(tmp_path, library):
    ensure(embedded(tmp_path))
    folder = tmp_path / "embedded"
    text = ""
    for split in ("train", "validation"):
        source = ShardSource(str(folder), split=split, seq_len=1, n_lookahead=1, seed=0)
        rows = source.read(np.arange(source.n_windows, dtype=np.uint64)).tokens
        numbers = source.order(np.arange(source.n_windows, dtype=np.uint64)).argsort()
        text += open_tokenizer(folder).decode(rows[numbers, 0].tolist())
    assert "# -*- coding: latin-1 -*-\n# é" in text


def test_other_data_is_checked_but_not_made(make_shards, texts, tmp_path):
    ensure(DataConfig(kind=Kind.synthetic, vocab_size=16))
    config = make_shards(texts)
    ensure(config)
    (tmp_path / "shards" / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: the shard cannot be opened"):
        ensure(config)
    with pytest.raises(DataError, match="no whole corpus"):
        ensure(DataConfig(kind=Kind.shards, folder=str(tmp_path / "none")))
