"""Import and export of a model that does not fit beside itself: memory stays near one shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WRITE = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from models import compose
from zoo import hf
from zoo.decoder import Decoder

config = compose("mistral_7b", n_layers=4)
with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}

def get(name):
    seed = sum(name.encode())
    return torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)

hf.write(config, get, folder=Path(sys.argv[1]), shard_bytes=500_000_000)
"""

MEASURE = """
import re, sys
from pathlib import Path
from trainer import hf

def memory(key):  # of this process, in bytes
    return int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
assert hf.main(sys.argv[1:]) == 0
print("PEAK", memory("VmHWM") - before)
"""


def run(script, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_no_more_than_one_and_a_half_shards_are_in_memory(tmp_path):
    first, checkpoint, second = tmp_path / "first", tmp_path / "step-00000000", tmp_path / "second"
    run(WRITE, str(first))
    sizes = [file.stat().st_size for file in first.glob("*.safetensors")]
    assert len(sizes) >= 4 and sum(sizes) > 2e9
    for words in (["import", str(first), str(checkpoint)], ["export", str(checkpoint), str(second)]):
        peak = int(run(MEASURE, *words).split("PEAK")[1])
        print(f"{words[0]}: {peak / max(sizes):.2f} of the largest shard")
        assert peak <= 1.5 * max(sizes), f"{words[0]}: {peak / max(sizes):.2f} of the largest shard"
    assert same(first, second)


def same(one, other):
    """Whether two folders hold the same tensors."""
    from safetensors import safe_open

    where = json.loads((one / "model.safetensors.index.json").read_text())["weight_map"]
    whole = {key: file for file in other.glob("*.safetensors") for key in safe_open(file, "pt").keys()}
    assert whole.keys() == where.keys()
    for key, file in where.items():
        with safe_open(one / file, "pt") as a, safe_open(whole[key], "pt") as b:
            if not (a.get_tensor(key) == b.get_tensor(key)).all():
                return False
    return True
