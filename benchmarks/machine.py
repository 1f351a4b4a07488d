"""What a result must say of the machine and the code: never a host name or a path."""

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """A machine, as far as a reader of results needs to know it.

    Attributes:
        cpu: the model's name.
        cores: that this process may use.
        bf16: instructions for bf16 products that the CPU has, or "none".
        memory: GB.
    """

    cpu: str
    cores: int
    bf16: str
    memory: int

    @property
    def slug(self) -> str:
        """Its part of a file's name, for example ``intel-xeon-processor-2-cores``."""
        words = re.sub(r"\((r|tm)\)|@.*", " ", self.cpu.lower())
        return "-".join(re.findall(r"[a-z0-9.]+", words)) + f"-{self.cores}-cores"

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {self.memory} GB; instructions for bf16 products: {self.bf16}"


def machine() -> Machine:
    """This one; Linux only."""
    info = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"model name\s*: (.*)", info) or [platform.machine()]
    flags = set(info.split())
    found = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    kilobytes = re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return Machine(names[0], torch.get_num_threads(), ", ".join(found) or "none", round(int(kilobytes[0]) / 1e6))


def commit() -> str:
    """The checked-out commit, and whether files differ from it."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
