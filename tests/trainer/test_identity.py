"""Which models are the same to a checkpoint, and how a difference is said."""

import json
import logging

import pytest
from models import compose, randomized

from trainer import hf as command
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.identity import from_plain, identity, plain
from trainer.manifest import CheckpointError, first_difference
from trainer.start import fill_from
from zoo import hf
from zoo.config import ModelConfig

TINY = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "n_mtp": 0, "blocks__dense__mlp__d_ff": 32}


def difference(saved: ModelConfig, wanted: ModelConfig) -> str | None:
    one, other = (json.loads(json.dumps(identity(config, tokenizer="t"))) for config in (saved, wanted))
    return first_difference(one, other)


def test_kinds_that_no_layer_has_and_names_of_kinds_mean_nothing():
    config = compose("deepseek_v3_tiny", prefix=[])
    assert difference(config, compose("deepseek_v3_tiny", prefix=[], blocks__dense__mlp__d_ff=48)) is None
    renamed = compose("deepseek_v3_tiny", prefix=["moe"] * 2)
    renamed.blocks = {"experts": renamed.blocks["moe"]}
    renamed.prefix, renamed.cycle = ["experts"], ["experts", "experts"]
    assert difference(config, renamed) is None


def test_what_only_steers_training_may_change():
    config = compose("deepseek_v3_tiny")
    steered = {"balance_rate": 0.5, "balance_loss": 0.0}
    changes = {f"blocks__moe__moe__router__{key}": value for key, value in steered.items()}
    assert difference(config, compose("deepseek_v3_tiny", init__std=1.0, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 6}, "model.n_layers is 4, not 6"),
        ({"blocks__dense__mlp__d_ff": 48}, "model.layers.0.mlp.d_ff is 512, not 48"),
        ({"blocks__moe__moe__top_k": 2}, "model.layers.1.moe.top_k is 4, not 2"),
        ({"blocks__moe__moe__router__scale": 1.0}, "model.layers.1.moe.router.scale is 2.5, not 1.0"),
        ({"prefix": ["dense", "dense"]}, "model.layers.1.mlp is null, not {"),
    ],
)
def test_the_first_layer_that_differs_is_named(changes, said):
    found = difference(compose("deepseek_v3_tiny"), compose("deepseek_v3_tiny", **changes))
    assert found is not None and found.startswith(said)


def test_a_config_comes_back_whole_from_a_checkpoint():
    config = compose("deepseek_v3_tiny", prefix=[])
    assert from_plain(json.loads(json.dumps(plain(config)))) == config
    broken = [{"family": "llama 9"}, {"d_modle": 3}, {"n_layers": "many"}, {"n_layers": 0}]
    for change in broken:
        with pytest.raises(CheckpointError, match="^the model in the checkpoint cannot be built: .*$"):
            from_plain(plain(config) | change)


@pytest.mark.parametrize("name", ["llama3_tiny", "deepseek_v3_tiny"])
def test_a_model_starts_from_its_own_export(tmp_path, caplog, name):
    """Also one whose YAML has kinds of layer that no layer is of: an export knows nothing of them."""
    dense = {"prefix": []} if name == "deepseek_v3_tiny" else {}
    config = compose(name, **TINY | dense)
    model = randomized(config, seed=0)
    settings = CheckpointConfig(every=0, keep=0, resume="never", init=None)
    about = identity(config, tokenizer="")
    writer = Checkpoints(tmp_path, config=settings, rank=0, world_size=1, about=about)
    writer.save(3, {"model": model.state_dict()}, progress={"model": plain(config)})
    checkpoint, folder, again = (tmp_path / name for name in ("step-00000003", "hf", "step-00000000"))
    assert command.main(["export", str(checkpoint), str(folder)]) == 0
    assert command.main(["import", str(folder), str(again)]) == 0
    for source in (checkpoint, folder, again):
        other = randomized(config, seed=1)
        with caplog.at_level(logging.WARNING):
            fill_from(other, source)
        assert all((value == other.state_dict()[name]).all() for name, value in model.state_dict().items())
    wider = randomized(compose(name, **TINY | dense | {"vocab_size": 65}), seed=1)
    for source in (checkpoint, folder, again):
        with pytest.raises(CheckpointError, match="holds another model: model.vocab_size is 64, not 65"):
            fill_from(wider, source)


def test_a_fault_of_the_disk_or_a_folder_is_one_line(tmp_path, capsys):
    hf.save(randomized(compose("llama3_tiny", **TINY), seed=0), tmp_path / "hf")
    (tmp_path / "file").write_text("")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"metadata": {}}')
    for words in (
        ["import", str(tmp_path / "hf"), str(tmp_path / "step-00000000")],
        ["import", "n" * 300, str(tmp_path / "step-00000000")],
        ["export", "n" * 300, str(tmp_path / "hf")],
        ["export", str(tmp_path / "file"), str(tmp_path / "hf")],
    ):
        assert command.main(words) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("error: ")
