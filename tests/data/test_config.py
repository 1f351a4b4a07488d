"""The choices of data and the checks of their values."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.config import DataConfig, Kind, PrepareConfig, TokenizerConfig, TokenizerKind

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("name", ["stdlib", "synthetic"])
def test_every_choice_is_whole(name):
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    assert OmegaConf.to_object(config).kind is Kind(name)


def test_the_choice_of_shards_asks_for_a_folder():
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / "shards.yaml"))
    with pytest.raises(ValueError, match=r"data\.folder=None: must be a folder of shards"):
        OmegaConf.to_object(config)
    config.folder = "shards/books"
    assert OmegaConf.to_object(config).folder == "shards/books"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(kind=Kind.synthetic, vocab_size=7), r"data\.vocab_size=7: must be 8 or more"),
        (lambda: DataConfig(kind=Kind.synthetic), r"data\.vocab_size=None: must be 8 or more"),
        (lambda: DataConfig(folder="x", vocab_size=10, validation=0.1), r"data\.vocab_size=10: must be 300 or more"),
        (lambda: DataConfig(folder="x", vocab_size=500), r"data\.validation=0\.0: must be above 0"),
        (lambda: TokenizerConfig(kind=TokenizerKind.tokenizers), r"tokenizer\.file=None: must be a tokenizer\.json"),
        (lambda: TokenizerConfig(kind=TokenizerKind.tiktoken), r"tokenizer\.name=None: must be given, or else file"),
        (lambda: TokenizerConfig(name="gpt2"), r"tokenizer\.name=gpt2: must be null with kind=sentencepiece"),
        (lambda: PrepareConfig(out="x"), r"source=None: must be a file, a folder"),
        (lambda: PrepareConfig(source="x"), r"out=None: must be a folder to make"),
        (lambda: PrepareConfig(source="x", out="y"), r"vocab_size=None: must be 300 or more"),
        (
            lambda: PrepareConfig(source="x", out="y", vocab_size=500, tokenizer=TokenizerConfig(file="z")),
            r"vocab_size=500: must be null: the tokenizer that is given has its own size",
        ),
        (lambda: PrepareConfig(source="x", out="y", vocab_size=500, validation=1), r"validation=1: must be from 0"),
        (lambda: PrepareConfig(source="x", out="y", vocab_size=500, shard_tokens=0), r"shard_tokens=0: must be 1"),
        (lambda: PrepareConfig(source="x", out="y", vocab_size=500, threads=-1), r"threads=-1: must be 0 or more"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_config_imports_no_torch():
    code = "import sys, data.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_preparing_imports_no_torch():
    code = "import sys, data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
