"""Preparations that were killed, and disks that were full."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from data import files
from data.errors import DataError
from data.manifest import read_manifest
from data.prepare import main, parse, prepare

COMMAND = [sys.executable, "-m", "data.prepare"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the code under test may catch it."""


@pytest.fixture
def source(tmp_path, texts):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def arguments(source, out, byte_ranks, *more):
    return [
        f"source={source}", f"out={out}", "tokenizer.kind=tiktoken", f"tokenizer.file={byte_ranks}",
        "validation=0.2", "shard_tokens=3000", *more,
    ]  # fmt: skip


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stopping_before_and_after_every_rename_changes_nothing(source, tmp_path, byte_ranks, monkeypatch):
    rename = os.replace
    prepare(parse(arguments(source, tmp_path / "whole", byte_ranks)))
    for count in itertools.count():
        for after in (False, True):
            out = tmp_path / f"stopped-{count}-{after}"
            n_renames = 0

            def stop(partial, path, *, after=after, count=count):
                nonlocal n_renames
                n_renames += 1
                if n_renames <= count or after:
                    rename(partial, path)
                if n_renames > count:
                    raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(files.os, "replace", stop)
                try:
                    prepare(parse(arguments(source, out, byte_ranks)))
                except Killed:
                    assert n_renames == count + 1
            whole_already = (out / "manifest.json").exists()
            prepare(parse(arguments(source, out, byte_ranks)))
            assert content(out) == content(tmp_path / "whole")
            if whole_already and not after:  # nothing was left to stop
                assert count > 15
                return


SELF_KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from data.prepare import main

def wait_and_kill():  # in the process itself, which a busy machine slows down as much as what it watches
    while len(list(Path(sys.argv[1]).glob("train-*.bin"))) < int(sys.argv[2]):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=wait_and_kill, daemon=True).start()
sys.exit(main(sys.argv[3:]))
"""


def test_a_killed_preparation_continues_byte_by_byte(tmp_path, byte_ranks):
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} " + "word " * (n % 50)}) + "\n" for n in range(6000)))
    words = arguments(source, tmp_path / "killed", byte_ranks, "shard_tokens=30000")
    n_killed = 0
    for wanted in (1, 4, 8, 12, 16):  # shards that are there when the signal comes
        command = [sys.executable, "-c", SELF_KILLED, tmp_path / "killed", str(wanted), *words]
        ended = subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        n_killed += ended.returncode == -signal.SIGKILL
    assert n_killed >= 3
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(arguments(source, tmp_path / "whole", byte_ranks, "shard_tokens=30000")) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_finished_shards_are_kept(source, tmp_path, byte_ranks, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_at_third(monkeypatch, source, out, byte_ranks)
    shard = out / "train-00000.bin"
    before = shard.stat().st_ino, shard.stat().st_mtime_ns
    assert main(arguments(source, out, byte_ranks)) == 0
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == before
    assert "continuing after" in capsys.readouterr().err


def stop_at_third(monkeypatch, source, out, byte_ranks):
    rename = os.replace

    def stop(partial, path):
        if path.name == "train-00002.bin":
            raise Killed
        rename(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", stop)
        with pytest.raises(Killed):
            prepare(parse(arguments(source, out, byte_ranks)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("validation=0.3", "validation=0.3: must be 0.2, with which"),
        ("shard_tokens=99", "shard_tokens=99: must be 3000"),
        ("tokenizer.eos=<|endoftext|>", "tokenizer.eos=<|endoftext|>: must be None"),
    ],
)
def test_other_settings_do_not_continue_it(source, tmp_path, byte_ranks, monkeypatch, capsys, changed, message):
    out = tmp_path / "out"
    stop_at_third(monkeypatch, source, out, byte_ranks)
    before = content(out)
    assert main(arguments(source, out, byte_ranks, changed)) == 2
    assert message in capsys.readouterr().err
    assert content(out) == before


def test_another_source_or_tokenizer_does_not_continue_it(source, tmp_path, byte_ranks, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_at_third(monkeypatch, source, out, byte_ranks)
    source.write_text(source.read_text() + '{"text": "more"}\n')
    assert main(arguments(source, out, byte_ranks)) == 2
    assert "source=files with sha256" in capsys.readouterr().err
    byte_ranks.write_bytes(byte_ranks.read_bytes() + b"YWI= 300\n")
    source.write_text(source.read_text().removesuffix('{"text": "more"}\n'))
    assert main(arguments(source, out, byte_ranks)) == 2
    assert "tokenizer.file=file with sha256" in capsys.readouterr().err


def test_a_finished_shard_that_is_gone_is_named(source, tmp_path, byte_ranks, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_at_third(monkeypatch, source, out, byte_ranks)
    (out / "train-00001.bin").unlink()
    assert main(arguments(source, out, byte_ranks)) == 2
    assert "train-00001.bin: the shard cannot be opened" in capsys.readouterr().err


def test_damaged_progress_is_named(source, tmp_path, byte_ranks, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_at_third(monkeypatch, source, out, byte_ranks)
    (out / "progress.json").write_text("{")
    assert main(arguments(source, out, byte_ranks)) == 2
    assert "progress.json: is damaged; remove the folder" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_room_lets_it_continue(source, tmp_path, byte_ranks):
    """A limit on the size of files stands for the full disk: the same refusal of the same call."""
    out = tmp_path / "out"
    command = [*COMMAND, *arguments(source, out, byte_ranks, "shard_tokens=1000000")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("data.prepare: ")]
    assert len(lines) == 1 and "train-00000.bin: cannot be written: File too large" in lines[0]
    assert "Traceback" not in done.stderr
    with pytest.raises(DataError, match="no whole corpus"):
        read_manifest(out)
    assert not list(out.glob("*.partial"))
    assert subprocess.run(command, capture_output=True).returncode == 0
    read_manifest(out)


def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
