"""What a run leaves in Weights & Biases, and that it never waits for it long."""

import http.server
import io
import itertools
import json
import struct
import threading
import time

import pytest
import wandb
from rich.console import Console
from wandb.proto import wandb_internal_pb2

from trainer.config import CurveAxis, LogConfig, Wandb
from trainer.log import Log, _run_id
from trainer.metrics import Metrics

SETTINGS = {"model": {"d_model": 64, "cycle": ["dense"]}, "seed": 3}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No account of this machine, no client left over from another test."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


@pytest.fixture
def server():
    """Starts servers here: ``status`` after ``delay`` seconds, to the first ``prompt`` questions at once."""
    running = []

    def start(*, status=200, delay=0.0, prompt=0):
        questions = itertools.count()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                if next(questions) >= prompt:
                    time.sleep(delay)
                self.send_response(status)
                self.end_headers()

            def log_message(self, format, *args):
                pass

        one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        running.append(one)
        return f"http://127.0.0.1:{one.server_port}"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def config(kind):
    return LogConfig(wandb=kind, project="zoo-test", every=10.0, curve=CurveAxis.linear, experts=1)


def train(run_dir, *, kind=Wandb.offline, steps=(1, 2, 3), rank=0):
    """Logs a few updates, the last one evaluated; returns what the console got."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    run_dir.mkdir(exist_ok=True)
    with Log(config(kind), run_dir=run_dir, rank=rank, steps=3, settings=SETTINGS, entropy=2.0, console=console) as log:
        for step in steps:
            row = {"step": step, "tokens": 64 * step, "loss": 1 / 3 + step, "tokens_per_second": 100.0}
            row |= {"val_loss": 4.5} if step == steps[-1] else {}
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            log.row(row)
    return out.getvalue()


def chunks(content):
    """Payloads of a LevelDB log after W&B's header. A part is crc, length, kind, bytes, and spans no 32 KiB block."""
    header, block = struct.Struct("<IHB"), 32768
    identity, _, _ = struct.unpack_from("<4sHB", content)
    assert identity == b":W&B"
    at, parts = 7, []
    while at + header.size <= len(content):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(content, at)
        at += header.size
        parts.append(content[at : at + length])
        at += length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def records(file):
    """Every record of an offline run's file."""
    wandb.teardown()  # the client's process writes the end of the file when it goes
    for data in chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def history(file):
    """The logged rows, keys joined by dots, without the client's own."""
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            yield {key: value for key, value in items.items() if not key.startswith("_")}


def test_the_offline_run_holds_config_metrics_and_the_curve(tmp_path):
    train(tmp_path / "run")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    (start,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    kept = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert {key: kept[key] for key in SETTINGS} == SETTINGS
    assert (start.project, start.display_name) == ("zoo-test", "run")
    rows = list(history(file))
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, 1 / 3 + step) for step in (1, 2, 3)]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == [4.5]
    pictures = list(file.parent.glob("files/media/images/loss_curve_*.png"))
    assert pictures
    assert (tmp_path / "run" / "plots" / "loss.png").read_bytes() in [picture.read_bytes() for picture in pictures]
    logged = [value for row in rows for key, value in row.items() if key.startswith("loss_curve")]
    assert any("image-file" in str(value) for value in logged)


def test_the_load_of_experts_is_drawn_with_the_curve_and_again_after_a_restart(tmp_path):
    run_dir = tmp_path / "run"
    with Log(config(Wandb.offline), run_dir=run_dir, rank=0, steps=3, settings=SETTINGS) as log:
        log.row({"step": 1, "tokens": 64, "loss": 1.0, "tokens_per_second": 1.0, "val_loss": 4.5})
        assert not (run_dir / "plots" / "experts.png").exists()
        metrics = Metrics(run_dir, rank=0, step=1)
        for step in (1, 2):
            of = {"blocks.1": [1, 2, 9], "blocks.2": [4, 4, 4]}
            metrics.add_loads(step, of)
            log.loads(step, of)
        log.row({"step": 2, "tokens": 128, "loss": 1.0, "tokens_per_second": 1.0, "val_loss": 4.5})
        first = (run_dir / "plots" / "experts.png").read_bytes()
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert list(file.parent.glob("files/media/images/expert_load_*.png"))
    logged = [key for row in history(file) for key in row]
    assert any(key.startswith("expert_load") for key in logged)
    with Log(config(Wandb.disabled), run_dir=run_dir, rank=0, steps=3, settings=SETTINGS) as log:
        log.row({"step": 3, "tokens": 192, "loss": 1.0, "tokens_per_second": 1.0})
    assert (run_dir / "plots" / "experts.png").read_bytes() == first  # of the loads in the file


def test_a_resumed_run_keeps_its_id_and_draws_the_whole_curve(tmp_path):
    train(tmp_path / "run", steps=(1, 2))
    before = (tmp_path / "run" / "wandb" / "run-id").read_text()
    train(tmp_path / "run", steps=(3,))
    assert (tmp_path / "run" / "wandb" / "run-id").read_text() == before
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{before}.wandb"}
    assert [row["step"] for file in files for row in history(file) if "loss" in row] == [1, 2, 3]


def test_a_finished_run_started_again_says_so_and_logs_nothing(tmp_path):
    train(tmp_path / "run")
    shown = train(tmp_path / "run", steps=())
    assert shown.startswith(f"{tmp_path / 'run'}: its 3 updates are made")
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_disabled_and_other_ranks_leave_no_trace(tmp_path):
    train(tmp_path / "disabled", kind=Wandb.disabled)
    assert not (tmp_path / "disabled" / "wandb").exists()
    assert (tmp_path / "disabled" / "plots" / "loss.png").exists()
    assert train(tmp_path / "other", rank=1) == ""
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["metrics.jsonl"]


def offline_after(tmp_path, monkeypatch, *, url, key):
    """Asks for an online run at ``url``; returns its one line and the seconds until the run could train."""
    monkeypatch.setenv("WANDB_BASE_URL", url)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    start = time.monotonic()
    shown = train(tmp_path / "run", kind=Wandb.online)
    seconds = time.monotonic() - start
    (line,) = [line for line in shown.splitlines() if line.startswith("log.wandb")]
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert [row["step"] for row in history(file) if "loss" in row] == [1, 2, 3]
    assert "kept offline" in line
    return line, seconds


def test_without_a_key_a_run_is_kept_offline(tmp_path, monkeypatch, server):
    line, seconds = offline_after(tmp_path, monkeypatch, url=server(), key=False)
    assert "no API key" in line
    assert seconds < 8


def test_without_network_a_run_is_kept_offline(tmp_path, monkeypatch):
    line, seconds = offline_after(tmp_path, monkeypatch, url="http://127.0.0.1:9", key=True)
    assert "cannot be reached" in line
    assert seconds < 8


def test_a_server_that_never_answers_is_not_waited_for(tmp_path, monkeypatch, server):
    line, seconds = offline_after(tmp_path, monkeypatch, url=server(delay=30), key=True)
    assert "127.0.0.1" in line
    assert seconds < 10


@pytest.mark.slow  # the client's own process takes half a minute to give up
def test_a_server_that_falls_silent_is_waited_for_a_few_seconds(tmp_path, monkeypatch, server):
    line, seconds = offline_after(tmp_path, monkeypatch, url=server(delay=60, prompt=1), key=True)
    assert "log.wandb=online" in line
    assert seconds < 12


def test_a_failed_run_is_marked_as_failed(tmp_path):
    with pytest.raises(ArithmeticError):
        with Log(
            config(Wandb.offline), run_dir=tmp_path, rank=0, steps=3, settings={}, console=Console(file=io.StringIO())
        ):
            raise ArithmeticError("diverged")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert [record.exit.exit_code for record in records(file) if record.WhichOneof("record_type") == "exit"] == [1]


def test_a_server_that_refuses_the_key_is_told(tmp_path, monkeypatch, server):
    line, seconds = offline_after(tmp_path, monkeypatch, url=server(status=401), key=True)
    assert seconds < 10


@pytest.mark.parametrize("left", [None, ""])
def test_a_run_id_is_made_where_there_is_none(tmp_path, left):
    (tmp_path / "wandb").mkdir()
    if left is not None:
        (tmp_path / "wandb" / "run-id").write_text(left)
    made = _run_id(tmp_path)
    assert len(made) == 8 and _run_id(tmp_path) == made
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == ["run-id"]


def test_a_client_that_does_not_start_costs_one_line_and_no_run(tmp_path, monkeypatch):
    def refuse(**settings):
        raise wandb.Error("no core\nfor this machine")

    monkeypatch.setattr(wandb, "init", refuse)
    shown = train(tmp_path / "run")
    assert "log.wandb=offline: no core for this machine; this run goes on without Weights & Biases\n" in shown
    assert (tmp_path / "run" / "plots" / "loss.png").exists()


def test_a_curve_that_cannot_be_drawn_does_not_hide_why_a_run_failed(tmp_path):
    (tmp_path / "plots").write_text("in the way")
    console = Console(file=io.StringIO())
    with pytest.raises(ArithmeticError):
        with Log(config(Wandb.disabled), run_dir=tmp_path, rank=0, steps=3, settings={}, console=console) as log:
            log.row({"step": 1, "tokens": 64, "loss": 3.0, "tokens_per_second": 1.0})
            raise ArithmeticError("diverged")
    with pytest.raises(OSError, match="cannot write .*plots/loss.png"):
        with Log(config(Wandb.disabled), run_dir=tmp_path, rank=0, steps=3, settings={}, console=console) as log:
            log.row({"step": 1, "tokens": 64, "loss": 3.0, "tokens_per_second": 1.0})
