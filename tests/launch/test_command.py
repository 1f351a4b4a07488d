"""How a run ends: status.json, exit statuses, signals, and whose the folder is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema import ConfigError
from launch import command
from launch.command import outcome, refusing

ERRORS = (ConfigError, OSError)
ROOT = Path(__file__).parents[2]


def status(run_dir):
    said = json.loads((run_dir / "status.json").read_text())
    return said["outcome"], said["message"]


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def run(run_dir, *, rank=0):
    return outcome(run_dir, errors=ERRORS, rank=rank)


def refused(error, *, rank=0, lost=lambda error: "gone" in str(error)):
    with pytest.raises(SystemExit) as ended, refusing(ERRORS, rank=rank, lost=lost):
        raise error
    return ended.value.code


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(command, "OTHERS_WAIT", 0.0)


def full(monkeypatch, *, after=0):
    """os.replace of the module under test refuses, but for the first few times."""
    count = iter(range(1000))
    replace = os.replace

    def refuse(*args):
        if next(count) >= after:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(command.os, "replace", refuse)


def test_a_run_is_running_then_finished(tmp_path):
    with run(tmp_path / "run"):
        assert status(tmp_path / "run") == ("running", "")
    assert status(tmp_path / "run") == ("finished", "")
    assert names(tmp_path / "run") == [".lock", "status.json"]


def test_other_ranks_write_nothing(tmp_path):
    with run(tmp_path / "run", rank=1):
        pass
    assert not (tmp_path / "run").exists()


def test_an_error_is_the_run_s_outcome(tmp_path):
    with pytest.raises(ConfigError), run(tmp_path):
        raise ConfigError("seed=x: wrong")
    assert status(tmp_path) == ("failed", "seed=x: wrong")


def test_sigterm_stops_a_run_and_the_handler_goes_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, run(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143
    assert status(tmp_path) == ("stopped", "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_does_not_hide_the_error_that_came_first(tmp_path):
    with pytest.raises(OSError, match="disk is full"), run(tmp_path):
        try:
            raise OSError("disk is full")
        finally:  # as when the log is closed
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert status(tmp_path) == ("failed", "disk is full")


def test_sigterm_explains_the_connection_that_others_closed(tmp_path):
    with pytest.raises(SystemExit), run(tmp_path):
        try:
            raise RuntimeError("Connection closed by peer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert status(tmp_path) == ("stopped", "SIGTERM after: Connection closed by peer")


def test_an_interruption_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, refusing(ERRORS, rank=0, lost=lambda error: False), run(tmp_path):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert status(tmp_path) == ("stopped", "SIGINT")
    assert capsys.readouterr().err == "stopped; the same command goes on from the last checkpoint\n"


def test_the_first_error_is_shown_when_no_more_can_be_written(tmp_path, monkeypatch):
    full(monkeypatch, after=1)
    with pytest.raises(ConfigError, match="first"), run(tmp_path):
        raise ConfigError("first")
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_status_that_cannot_be_written_is_named_and_does_not_say_running(tmp_path, monkeypatch, after):
    full(monkeypatch, after=after)
    with pytest.raises(OSError) as ended, run(tmp_path):
        pass
    assert str(ended.value) == f"cannot write {tmp_path}/status.json: No space left on device"
    assert names(tmp_path) == [".lock"]


def test_a_run_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(ConfigError, match=f"run_dir={run_dir}: must be a folder to write to: {why}"), run(run_dir):
            pass


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path):
    with run(tmp_path):
        with pytest.raises(ConfigError, match=f"run_dir={tmp_path}: another run"), run(tmp_path):
            pass
        assert status(tmp_path) == ("running", "")
    with run(tmp_path):
        pass


def test_a_killed_run_holds_no_folder(tmp_path):
    code = (
        "import pathlib, sys, time; from launch.command import outcome\n"
        "with outcome(pathlib.Path(sys.argv[1]), errors=(), rank=0): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError), run(tmp_path):
            pass
        other.kill()
    assert status(tmp_path) == ("running", "")
    with run(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch, caplog):
    def refuse(handle, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(command.fcntl, "flock", refuse)
    with run(tmp_path):
        pass
    assert "has no locks" in caplog.text


def test_others_are_quiet_about_a_process_that_is_gone(no_wait, capsys):
    assert refused(RuntimeError("peer is gone"), rank=1) == 2
    assert capsys.readouterr().err == ""


def test_rank_0_and_other_runtime_errors_keep_their_traceback(no_wait):
    for rank, said in ((0, "peer is gone"), (1, "shapes differ")):
        with pytest.raises(RuntimeError, match=said):
            refused(RuntimeError(said), rank=rank)


def test_a_fault_of_one_other_rank_is_said_by_it(no_wait, capsys):
    assert refused(ConfigError("seed=x: wrong"), rank=1) == 2
    assert capsys.readouterr().err == "error: seed=x: wrong\n"
