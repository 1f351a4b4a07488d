"""Losses that only a change with numerical intent may move: synthetic data, float64, three updates, 1e-10."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from conf import schema
from launch.world import World
from train import train

CONF = Path(__file__).parents[1] / "conf"
GOLDEN = {
    "llama3_tiny": [8.382038876800426, 8.345507557728624, 8.318977496102832, 8.30457400877796],
    "qwen3_tiny": [8.367349976336058, 8.39198960316891, 8.327975353405765, 8.288520285128763],
    "deepseek_v3_tiny": [8.368640219762657, 8.340491377437985, 8.310266770363441, 8.277046304570034],
}


@pytest.mark.parametrize("model", GOLDEN)
def test_losses_are_those_on_record(tmp_path, model):
    GlobalHydra.instance().clear()
    schema.register()
    overrides = [
        f"model={model}", "data=synthetic", "precision=fp64", "train.steps=3", "train.seq_len=48",
        "train.global_batch=4", "train.micro_batch=2", "train.eval_every=3", "train.eval_rows=2", "log.wandb=disabled",
        f"run_dir={tmp_path}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base=None):
        run = schema.resolve(compose("train", overrides=overrides))
    train(run, sizes=schema.check(run, world_size=1), place=World(rank=0, size=1, local_rank=0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in rows] + [rows[-1]["val_loss"]]
    assert found == pytest.approx(GOLDEN[model], rel=1e-10), found
