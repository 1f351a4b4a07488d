"""metrics.jsonl: exact numbers, one line an update, also after a kill."""

import json
import math
import time

import pytest
import torch

from trainer.metrics import FILE, LOADS, Metrics, MetricsError, cut, read, read_loads, to_floats


def record(metrics, *, step, loss=1.0, more=None):
    metrics.start(tokens=(step - 1) * 64)
    tensors = {"loss": torch.tensor(loss, dtype=torch.float64), "grad_norm": torch.tensor(0.5)}
    values = metrics.add(step=step, tokens=step * 64, tensors=tensors, numbers={"lr": 1e-3})
    metrics.merge(more or {})
    metrics.write()
    return values


def test_a_line_has_the_contract_s_keys_first_and_numbers_to_the_last_bit(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    loss = math.pi / 3
    record(metrics, step=1, loss=loss, more={"val_loss": 1 / 3})
    line = json.loads((tmp_path / FILE).read_text())
    assert list(line) == ["step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second", "val_loss"]
    assert (line["loss"], line["val_loss"], line["tokens"]) == (loss, 1 / 3, 64)


def test_every_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    for step in (1, 2):
        record(metrics, step=step)
        assert [row["step"] for row in read(tmp_path / FILE)] == list(range(1, step + 1))


def test_evaluation_between_updates_is_in_no_speed(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    record(metrics, step=1)
    time.sleep(0.3)
    record(metrics, step=2)
    last = read(tmp_path / FILE)[-1]
    assert last["seconds"] < 0.3
    assert last["tokens_per_second"] == 64 / last["seconds"]


def test_other_ranks_get_the_values_and_write_nothing(tmp_path):
    metrics = Metrics(tmp_path / "run", rank=1, step=0)
    assert record(metrics, step=1, loss=2.0) == {"loss": 2.0, "grad_norm": 0.5}
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_resume_cuts_the_updates_that_will_be_made_again(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    for step in range(1, 6):
        record(metrics, step=step, loss=float(step))
    before = (tmp_path / FILE).read_bytes().splitlines()[:3]
    metrics = Metrics(tmp_path, rank=0, step=3)
    assert (tmp_path / FILE).read_bytes().splitlines() == before
    record(metrics, step=4, loss=40.0)
    assert [row["loss"] for row in read(tmp_path / FILE)] == [1.0, 2.0, 3.0, 40.0]


def test_a_line_torn_by_a_kill_is_neither_read_nor_kept(tmp_path):
    file = tmp_path / FILE
    file.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read(file) == [{"step": 1, "loss": 2.5}]
    cut(file, after=9)
    assert file.read_text() == '{"step": 1, "loss": 2.5}\n'


@pytest.mark.parametrize(
    "damage", ["not json", "[1]", "{}", "3", '{"step": "2", "loss": 1}', '{"step": 2}', "\r", "\0\0", "\udcff"]
)
def test_a_damaged_line_is_named_and_nothing_is_cut(tmp_path, damage):
    file = tmp_path / FILE
    content = f'{{"step": 1, "loss": 2.5}}\n{damage}\n{{"step": 3, "loss": 2.5}}\n'.encode(errors="surrogateescape")
    file.write_bytes(content)
    for use in (lambda: read(file), lambda: Metrics(tmp_path, rank=0, step=1)):
        with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: must be a JSON object with numbers as step"):
            use()
    assert file.read_bytes() == content


def test_a_full_disk_names_the_file(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    metrics._rows._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError) as refused:
        record(metrics, step=1)
    assert str(refused.value) == f"cannot write {tmp_path / FILE}: No space left on device"


def test_a_line_is_written_whole_by_a_disk_that_takes_a_few_bytes_at_a_time(tmp_path):
    class Slow:
        def write(self, line):
            (tmp_path / "slow").open("ab").write(line[:7])
            return len(line[:7])

    metrics = Metrics(tmp_path, rank=0, step=0)
    metrics._rows._file = Slow()
    record(metrics, step=1)
    assert [row["step"] for row in read(tmp_path / "slow")] == [1]


def test_starting_over_keeps_the_lines_beside_the_checkpoints_that_were_set_aside(tmp_path):
    def restart(*, step):
        Metrics(tmp_path, rank=0, step=step).close()
        return [row["step"] for row in read(tmp_path / FILE)]

    metrics = Metrics(tmp_path, rank=0, step=0)
    for step in range(1, 5):
        record(metrics, step=step)
    before = (tmp_path / FILE).read_bytes()
    for number, name in ((1, "step-00000002"), (2, "step-00000004")):
        (tmp_path / "checkpoints" / f"replaced-{number}" / name).mkdir(parents=True)
    assert restart(step=4) == [1, 2, 3, 4]  # what was set aside before has nothing to do with it
    assert not list(tmp_path.rglob("replaced-*/metrics.jsonl"))
    assert restart(step=2) == [1, 2]
    assert (tmp_path / "checkpoints" / "replaced-2" / FILE).read_bytes() == before
    record(Metrics(tmp_path, rank=0, step=2), step=3, loss=9.0)
    assert restart(step=0) == []
    assert (tmp_path / "checkpoints" / "replaced-2" / FILE).read_bytes() == before
    assert len(list(tmp_path.rglob("replaced-*/*"))) == 3


def test_no_file_is_no_lines(tmp_path):
    assert read(tmp_path / FILE) == []


def test_narrow_numbers_and_infinities_arrive_exactly():
    tensors = {
        "half": torch.tensor(0.1, dtype=torch.bfloat16),
        "count": torch.tensor([2**40]),
        "inf": torch.tensor(math.inf),
    }
    assert to_floats(tensors) == {"half": 0.10009765625, "count": float(2**40), "inf": math.inf}
    assert to_floats({}) == {}


def test_loads_of_experts_are_kept_and_cut_as_lines_are(tmp_path):
    metrics = Metrics(tmp_path, rank=0, step=0)
    record(metrics, step=1)
    assert not (tmp_path / LOADS).exists()  # nothing before there are loads
    for step in (2, 4, 6):
        metrics.add_loads(step, {"blocks.1": [step, 0.0], "mtp.0": [1.0, 5.0]})
    metrics.sync()
    (tmp_path / "checkpoints" / "replaced-1" / "step-00000006").mkdir(parents=True)
    before = (tmp_path / LOADS).read_bytes()
    metrics = Metrics(tmp_path, rank=0, step=4)
    assert (tmp_path / "checkpoints" / "replaced-1" / LOADS).read_bytes() == before
    metrics.add_loads(6, {"blocks.1": [7, 7]})
    with (tmp_path / LOADS).open("a") as file:
        file.write('{"step": 8, "loa')
    found = [(2, {"blocks.1": [2, 0], "mtp.0": [1, 5]}), (4, {"blocks.1": [4, 0], "mtp.0": [1, 5]})]
    assert [*read_loads(tmp_path / LOADS)] == [*found, (6, {"blocks.1": [7, 7]})]
    Metrics(tmp_path, rank=1, step=0).add_loads(9, {"blocks.1": [1, 1]})
    assert [step for step, _ in read_loads(tmp_path / LOADS)] == [2, 4, 6]


def test_a_damaged_line_of_loads_is_named(tmp_path):
    (tmp_path / LOADS).write_text('{"step": 1, "loads": {}}\n{"loads": {}}\n')
    with pytest.raises(MetricsError, match=r"experts.jsonl, line 2: must be a JSON object with numbers as step$"):
        Metrics(tmp_path, rank=0, step=1)
