"""Peak memory of one implementation's step, in a process of its own.

Resident memory, read from the kernel, and not torch's count of tensors: scratch space of matrix products and what the
allocator cannot give back are paid for as well. A process of its own, since the peak of a process never falls.
"""

import argparse
import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.field import MODULES, named
from benchmarks.shape import SHAPES

STEPS = 2  # the first makes the optimizer's state, the second runs beside it


def peak(name: str, *, dtype: str, variant: str, rows: int) -> float:
    """GB (10^9 bytes) above what the process held once everything was imported and before the model was made."""
    command = [sys.executable, "-m", "benchmarks.memory", name, dtype, variant, str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the peak of the implementation, dtype and variant on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for key in ("name", "dtype", "variant"):
        parser.add_argument(key)
    parser.add_argument("rows", type=int)
    arguments = parser.parse_args()
    shape = replace(SHAPES[arguments.variant], rows=arguments.rows)
    entry = named(arguments.dtype, arguments.name)
    __import__(MODULES[arguments.name.split(":")[0]])
    tokens = torch.randint(0, shape.vocab_size, (2, shape.rows, shape.seq_len))
    gc.collect()
    before = _status("VmRSS")
    contender = entry.build(shape)
    for _ in range(STEPS):
        contender.gradients(tokens[0], tokens[1])
        contender.update()
    print((_status("VmHWM") - before) / 1e6)


def _status(key: str) -> int:
    """A line of /proc/self/status, kB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    main()
