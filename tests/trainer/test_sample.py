"""Samples are whole files, and a disk that refuses them is named."""

from types import SimpleNamespace

import pytest

from trainer import sample
from trainer.sample import Sampler


class Letters:
    eos = 0

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens[1:]))


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda model, *, prompt, n_tokens, device: [ord("!")] * n_tokens)

    def once(rank=0):
        mesh = SimpleNamespace(rank=rank, device="cpu")
        Sampler(Letters(), tmp_path / "samples", mesh, "So", 2).write(None, step=7)

    return once


def test_rank_0_writes_prompt_and_continuation(tmp_path, write):
    write(rank=1)
    assert not (tmp_path / "samples").exists()
    write()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000007.txt"]
    assert (tmp_path / "samples" / "step-00000007.txt").read_text() == "So!!"


def test_a_folder_that_refuses_is_named(tmp_path, write):
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/samples/step-00000007.txt: "):
        write()
