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
    "chameleon_tiny": [8.339712350046895, 8.330007458556073, 8.337309470200871, 8.236411104827502],
    "deepseek_v2_tiny": [8.374504398322491, 8.339437477614949, 8.307422298541518, 8.269193011252785],
    "deepseek_v3_tiny": [8.368640219760799, 8.340491377436198, 8.310266770369232, 8.277046304565241],
    "gemma3_tiny": [8.353819821656487, 8.331690370857157, 8.348744249089934, 8.239855222398774],
    "glm45_tiny": [8.378433292788959, 8.31306466647283, 8.338067559844099, 8.313519431303984],
    "glm45_air_tiny": [8.391518613121026, 8.36388053120877, 8.32000117454247, 8.280841488405809],
    "gpt2_tiny": [8.344343031855946, 8.269939922594126, 8.188313613795462, 8.069338255544974],
    "gpt_oss_tiny": [8.352187262326702, 8.340211204116093, 8.322471967331534, 8.31728706570093],
    "grok2_tiny": [8.325442074879778, 8.325698712450142, 8.328087533677326, 8.30004688180678],
    "kimi_k2_tiny": [8.362623953350838, 8.35465442247185, 8.301842915246237, 8.27626034160596],
    "llama3_tiny": [8.382038876973958, 8.345507557680701, 8.318977495979965, 8.304574008526616],
    "llama4_maverick_tiny": [8.340873930994892, 8.359765008356572, 8.332566724054256, 8.28141665221612],
    "llama4_scout_tiny": [8.335563807055275, 8.36677746440678, 8.332567374842583, 8.288478300425158],
    "mistral_tiny": [8.35729158417362, 8.40644204454535, 8.346508535303673, 8.278547726112116],
    "mistral_small_tiny": [8.364978714449467, 8.369302911927857, 8.305129971837982, 8.247849583327504],
    "mixtral_tiny": [8.340404860813326, 8.364579526836412, 8.345722033038575, 8.291420046939125],
    "olmo2_tiny": [8.344975678650206, 8.384339682613735, 8.32636509048204, 8.296553465580955],
    "qwen3_tiny": [8.367349976710774, 8.391989601941539, 8.327975352364593, 8.288520284836093],
    "qwen3_moe_tiny": [8.34915265247552, 8.345618593581829, 8.328919928463542, 8.325715473711764],
    "qwen3_next_tiny": [8.349728136552367, 8.353980612599061, 8.342038943367353, 8.25761203566782],
    "smollm3_tiny": [8.336610046215275, 8.351777225424641, 8.326816889889939, 8.26627655347905],
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
