"""``docs/add_architecture.md`` works: its three rows, put where it says into a copy, make a family that passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add_architecture.md"
STEP = re.compile(r"<!-- (create|insert): (\S+)(?: (before|after) (.+?))? -->\n```\w+\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The rooms that the page touches, with its rows."""
    folder = tmp_path_factory.mktemp("copy")
    for room in ("conf", "zoo", "tests"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    steps = STEP.findall(PAGE.read_text(encoding="utf-8"))
    assert len(steps) == 4
    for verb, name, side, line, block in steps:
        if verb == "create":
            (folder / name).write_text(block, encoding="utf-8")
        else:
            insert(folder / name, block, side=side, line=line)
    return folder


def insert(file, block, *, side, line):
    """Put a block before or after the one line that begins with ``line``."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [i for i, text in enumerate(lines) if text.startswith(line)]
    assert len(places) == 1, f"{file}: {line} {places}"
    lines.insert(places[0] + (side == "after"), block)
    file.write_text("".join(lines), encoding="utf-8")


def run(folder, *words):
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


def test_the_new_family_equals_transformers(copy):
    done = run(copy, "-m", "pytest", "-q", "tests/zoo/test_parity.py", "tests/zoo/test_hf_families.py", "-k", "qwen2")
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 6, done.stdout


def test_the_new_model_has_its_published_count(copy):
    done = run(copy, "-m", "zoo", "qwen25_05b", "--json")
    assert done.returncode == 0, done.stderr
    assert '"parameters": 494032768' in done.stdout
    assert "494,032,768" in PAGE.read_text(encoding="utf-8")
