"""Whether a plan fits, in numbers, in one line and on any console."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from parallel.config_fit import Sizes
from planner import show
from planner.config import DeviceKind, HardwareConfig
from planner.report import GIB, DoesNotFit, Memory, Report
from planner.wire import Line

FILES = sorted((Path(__file__).parents[2] / "conf" / "hardware").glob("*.yaml"))
H100 = HardwareConfig("h100_80gb", DeviceKind.cuda, 79.1, 3.0, 989.0, 67.0, 3.35, 8, 450.0, 50.0)
AT_PEAK = {"experts": 40 * GIB, "parameters": 10 * GIB, "optimizer state": 20 * GIB, "gradients": 5 * GIB}
MEMORY = Memory(
    10 * GIB, 10 * GIB, 20 * GIB, 4096, peak=75 * GIB, at_peak=AT_PEAK, phase="forward and backward", offloaded=False
)
LINES = [
    Line("fsdp", 32, "all-gather", 12, 3 * GIB, first=3, last=251),
    Line("tp", 8, "all-gather", 640, 45 * 10**9, first=8, last=15),
    Line("tp", 8, "all-reduce", 8, 1024, first=8, last=15),
]
REPORT = Report(
    title="llama 70.6B parameters; tp 8 x dp_shard 32 on cuda",
    sizes=Sizes(1, 32, tp=8),
    rank=11,
    tokens=(1, 8192),
    micro_batches=4,
    hardware=H100,
    memory=MEMORY,
    collectives=LINES,
    seconds=31.4,
    remarks=[],
)


def with_peak(gib):
    return replace(REPORT, memory=replace(MEMORY, peak=round(gib * GIB)))


def test_a_plan_fits_up_to_the_last_byte_beside_the_reserve():
    with_peak(76.1).check()
    with pytest.raises(DoesNotFit):
        with_peak(76.2).check()


def test_a_plan_that_does_not_fit_is_refused_in_one_line_that_says_by_how_much():
    with pytest.raises(DoesNotFit) as refusal:
        with_peak(96.1).check()
    assert str(refusal.value) == (
        "hardware=h100_80gb: rank 11 needs 99.1 GiB, of which 40.0 beside parameters, gradients and optimizer state, "
        "and has 79.1: 20.0 GiB short"
    )


def test_bytes_go_over_the_slowest_link_that_they_cross():
    fsdp, tp, _ = LINES
    assert REPORT.near(tp) and not REPORT.near(fsdp)
    assert REPORT.at_link_speed(tp) == pytest.approx(0.1)
    assert REPORT.at_link_speed(fsdp) == pytest.approx(3 * GIB / 50e9)


def shown(report, width):
    out = StringIO()
    show.show(report, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [72, 80, 200])
def test_a_console_shows_every_number_on_lines_that_it_has_room_for(width):
    text = shown(REPORT, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for words in ("rank 11 of 256", "4 micro-batches of 1 x 8,192", "40.00 GiB", "75.00 GiB", "99%", "fsdp", "640"):
        assert words in text, words
    assert "…" not in text


def test_what_fits_and_what_does_not_is_said():
    assert "does not fit" not in shown(REPORT, 80)
    assert "does not fit" in shown(with_peak(80), 80)


def test_what_an_offloading_plan_keeps_on_the_host_is_said():
    assert "in the memory of the host: 40.00 GiB" in shown(replace(REPORT, memory=replace(MEMORY, offloaded=True)), 80)


@pytest.mark.parametrize(
    "number, words", [(0, "0 B"), (1023, "1,023 B"), (1536, "1.50 KiB"), (5000 * GIB, "5,000.00 GiB")]
)
def test_bytes_are_shown_in_a_unit_that_fits(number, words):
    assert show.size(number) == words


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_machine_is_complete_and_bears_its_name(file):
    machine = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), OmegaConf.load(file)))
    assert isinstance(machine, HardwareConfig) and machine.name == file.stem
    assert 0.5 < machine.memory_gib / float(file.stem.partition("_")[2].removesuffix("gb")) < 1
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("memory_gib", 0.0, "hardware.memory_gib=0.0: must be above 0"),
        ("node_ranks", 0, "hardware.node_ranks=0: must be above 0"),
        ("network_gb_s", -1.0, "hardware.network_gb_s=-1.0: must be above 0"),
        ("reserve_gib", 80.0, "hardware.reserve_gib=80.0: must be 0 or more, and below hardware.memory_gib (79.1)"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_by_its_key(key, value, line):
    with pytest.raises(ValueError) as refusal:
        replace(H100, **{key: value})
    assert str(refusal.value) == line
