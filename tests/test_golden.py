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
    "chameleon_tiny": [8.352450645152025, 8.389543615265499, 8.357808693108076, 8.337799163623263],
    "deepseek_v2_tiny": [8.36492569104221, 8.3310881814836, 8.34142155158726, 8.279005899502305],
    "deepseek_v3_tiny": [8.360139244323246, 8.327766552756051, 8.345190055427459, 8.30525942770358],
    "gemma3_tiny": [8.375347311609053, 8.345847782089866, 8.3391881967803, 8.332067401285064],
    "glm45_tiny": [8.314396902711767, 8.330511113115843, 8.31841605267537, 8.258440809887107],
    "glm45_air_tiny": [8.341386593153446, 8.364767550980968, 8.362738519861761, 8.341506763113722],
    "gpt2_tiny": [8.328255374713484, 8.251668368411618, 8.13572062594753, 8.029959609462226],
    "gpt_oss_tiny": [8.347019730504075, 8.313667741120383, 8.368821769153502, 8.282093711955296],
    "grok2_tiny": [8.318670219078317, 8.336161258265259, 8.32375931477194, 8.292383287430798],
    "kimi_k2_tiny": [8.36120970322612, 8.326018865315273, 8.339976131256373, 8.302077202978902],
    "llama3_tiny": [8.36172554780582, 8.350673350240669, 8.330285456001118, 8.126328185493659],
    "llama4_maverick_tiny": [8.355194187644495, 8.374675238597247, 8.338669857971045, 8.3328806050857],
    "llama4_scout_tiny": [8.353302690046796, 8.350917547293975, 8.34359379859691, 8.340039360826987],
    "mistral_tiny": [8.363466327648933, 8.380656894520072, 8.353950447241072, 8.23445697870177],
    "mistral_small_tiny": [8.371163527001169, 8.341246874570611, 8.30814476606815, 8.243409452759606],
    "mixtral_tiny": [8.34710284982583, 8.363879133211928, 8.343121286022399, 8.335440696729542],
    "olmo2_tiny": [8.381727264191142, 8.367771771371665, 8.372032556976315, 8.346248059050987],
    "qwen3_tiny": [8.355903141809538, 8.317654060288138, 8.347188621969977, 8.248021586541428],
    "qwen3_moe_tiny": [8.345373452892822, 8.32967324379835, 8.376914131709217, 8.31932654360467],
    "qwen3_next_tiny": [8.360470549917572, 8.36541855667792, 8.35244509872907, 8.301601396953744],
    "smollm3_tiny": [8.37305174101391, 8.386808419608135, 8.3465238914693, 8.29882411461313],
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
