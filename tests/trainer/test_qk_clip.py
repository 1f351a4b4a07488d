"""QK-Clip on one process: what it holds, what it leaves alone, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose as composed_by_hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import compose
from saving import alone as saved_alone
from sharing import ADAMW, ALONE, FAMILIES, MUON, MUONCLIP, SETTINGS, Case, attention, mine, rows, shrunk

from conf import schema
from conf.fitting import check_clip
from launch.world import World
from parallel.config import Remat
from train import train
from trainer.attention_logits import attending, by_layer, largest
from trainer.config import OptimKind
from trainer.config_clip import QKClipConfig
from trainer.engine import count
from trainer.qk_clip import QKClip, gammas

CONF = Path(__file__).parents[2] / "conf"
MLA = {"n_heads": 4, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
WITHOUT_RANK = {"mla": MLA | {"q_rank": None}, "mlp": {"d_ff": 24}, "moe": {"n_experts": 8, "d_expert": 8}}
EVERY = {
    "MHA with biases": FAMILIES["gpt2"],
    "GQA": FAMILIES["llama3"],
    "GQA with biases and sinks": FAMILIES["gpt_oss"],
    "GQA with softcap and temperature": FAMILIES["grok2"],
    "MLA": FAMILIES["deepseek_v3"],
    "MLA without q_rank": lambda: shrunk("deepseek_v2_tiny", WITHOUT_RANK, n_mtp=0),
}


@pytest.fixture
def case(monkeypatch):
    """Makes a case of one of the models above, with forward and backward of one batch done."""

    def make(name, optim_config=MUONCLIP, plan=ALONE):
        monkeypatch.setitem(FAMILIES, name, EVERY.get(name, FAMILIES.get(name)))
        return Case(name, plan, optim_config=optim_config)

    return make


def backward(case, step=0):
    batches = mine(rows(step, case.config.n_mtp), case.mesh)
    case.engine.forward_backward(batches, count(batches, case.mesh))


def mixers(case):
    named = dict(case.model.named_modules())
    return {layer: named[f"{layer}.mixer"] for layer in attending(case.config)}


def plain_logits(mixer, kernel_inputs):
    """From what goes into a kernel, in float64: the largest visible scaled product of each head."""
    found = torch.full((mixer.config.n_heads,), -torch.inf, dtype=torch.float64)
    for q, k, mask in kernel_inputs:
        T = q.shape[1]
        scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
        hidden = ~mask.part(queries=range(T), keys=range(T))
        scores = (scores * mixer.kernel.scale).masked_fill(hidden, -torch.inf)
        found = torch.maximum(found, scores.amax(dim=(0, 2, 3)))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_largest_logits_of_a_batch_are_those_of_a_plain_computation(case, name):
    this, seen = case(name), {}
    for layer, mixer in mixers(this).items():
        seen[layer] = []
        mixer.kernel.register_forward_pre_hook(
            lambda kernel, args, into=seen[layer]: into.append((args[0].detach(), args[1].detach(), args[3]))
        )
    backward(this)
    logits = this.engine.meter.read()
    assert list(logits) == list(attending(this.config))
    for layer, mixer in mixers(this).items():
        assert seen[layer], layer
        torch.testing.assert_close(logits[layer], plain_logits(mixer, seen[layer]), rtol=1e-12, atol=0)
    told = by_layer(logits)
    assert told["max_attention_logit/blocks.1"] == logits["blocks.1"].max()
    assert largest(logits) == max(told.values())
    assert all((heads == -torch.inf).all() for heads in this.engine.meter.read().values())  # begun anew


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("name", EVERY)
def test_after_a_clip_the_same_inputs_have_logits_of_tau_at_most(case, name, alpha):
    this, inputs = case(name), {}
    for layer, mixer in mixers(this).items():
        inputs[layer] = []
        mixer.register_forward_pre_hook(lambda mixer, args, into=inputs[layer]: into.append(args))
    backward(this)
    logits = this.engine.meter.read()
    tau = torch.cat([*logits.values()]).median().item()
    before = {key: p.detach().clone() for key, p in this.model.named_parameters()}
    clipped = QKClip(this.model, QKClipConfig(tau=tau, alpha=alpha)).update(logits)
    assert clipped == sum(int((heads > tau).sum()) for heads in logits.values()) > 0
    for layer, mixer in mixers(this).items():
        done = inputs[layer][:]  # the hook hears these forwards too
        with torch.no_grad():
            for args in done:
                mixer(*args)
    gqa = next(iter(attending(this.config).values()))[0].attention
    for layer, after in this.engine.meter.read().items():
        n_groups = gqa.n_kv_heads if gqa else len(after)
        grouped = logits[layer].view(n_groups, -1)
        gamma = (tau / grouped.amax(1, keepdim=True)).clamp(max=1.0)
        assert after.max() <= tau * (1 + 1e-12)
        torch.testing.assert_close(after, (grouped * gamma).flatten(), rtol=1e-11, atol=0)
        for group in (gamma == 1).flatten().nonzero().flatten().tolist():  # heads below tau: not a bit
            assert torch.equal(after.view(n_groups, -1)[group], grouped[group])
    touched = {key for key, p in this.model.named_parameters() if not torch.equal(p, before[key])}
    allowed = ("wq.weight", "wq.bias", "wk.weight", "wk.bias", "wkv.weight")
    assert touched and all(key.partition(".mixer.")[2] in allowed for key in touched)


def test_values_and_the_shared_rotated_key_of_latent_attention_stay(case):
    this = case("MLA")
    backward(this)
    c = this.config.layers[0].mla
    before = {key: p.detach().clone() for key, p in this.model.named_parameters()}
    gamma = QKClip(this.model, QKClipConfig(tau=1e-3, alpha=0.5))
    logits = this.engine.meter.read()
    gamma.update(logits)
    for layer, heads in logits.items():
        factor = (1e-3 / heads).where(heads > 1e-3, 1.0)[:, None, None]
        named = {key: (before[f"{layer}.mixer.{key}"], dict(this.model.named_parameters())[f"{layer}.mixer.{key}"])
                 for key in ("wq.weight", "wkv.weight", "wkv_down.weight")}  # fmt: skip
        was, now = (x.view(4, c.nope_dim + c.rope_dim, -1) for x in named["wq.weight"])
        torch.testing.assert_close(now[:, : c.nope_dim], was[:, : c.nope_dim] * factor.sqrt())
        torch.testing.assert_close(now[:, c.nope_dim :], was[:, c.nope_dim :] * factor)
        was, now = (x.view(4, c.nope_dim + c.v_dim, -1) for x in named["wkv.weight"])
        torch.testing.assert_close(now[:, : c.nope_dim], was[:, : c.nope_dim] * factor.sqrt())
        assert torch.equal(now[:, c.nope_dim :], was[:, c.nope_dim :])
        assert torch.equal(*named["wkv_down.weight"])


@pytest.mark.parametrize("name", ["GQA with biases and sinks", "MLA"])
def test_where_no_head_exceeds_tau_everything_is_bitwise_as_without(case, name):
    loose = replace(MUONCLIP, qk_clip=QKClipConfig(tau=1e9, alpha=0.5))
    ours, theirs = case(name, loose), case(name, MUON)
    for step in range(3):
        got, want = ours.update(step), theirs.update(step)
        assert got[: len(want)] == want
        assert ours.attention.clipped == 0 and theirs.attention is None
    got, want = ours.tensors(), theirs.tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_what_is_not_asked_for_is_not_measured(case):
    this = case("GQA", ADAMW)
    assert this.engine.attention() is None
    assert all(mixer.kernel.top is None for mixer in mixers(this).values())


def test_an_infinite_logit_scales_nothing():
    logits = torch.tensor([1.0, 200.0, torch.inf, torch.nan, -torch.inf], dtype=torch.float64)
    assert gammas(logits, tau=100.0).tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("remat", [Remat.block, Remat.selective])
def test_recomputation_changes_no_logit(case, remat):
    for name in ("GQA", "GQA with biases and sinks", "MLA"):
        want, got = case(name), case(name, plan=replace(ALONE, remat=remat))
        for step in range(2):
            assert got.update(step) == want.update(step)


@pytest.mark.parametrize("remat", [Remat.none, pytest.param(Remat.block, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["GQA", pytest.param("GQA with biases and sinks", marks=pytest.mark.slow)])
def test_compiled_blocks_measure_too(case, name, remat):
    torch.compiler.reset()
    want, got = case(name), case(name, plan=replace(ALONE, compile=True, remat=remat))
    for step in range(2):
        assert got.update(step) == pytest.approx(want.update(step), rel=1e-9, abs=1e-15)
    assert got.attention.clipped > 0


RUN, TAU = 36, 5.0


def largest_of_a_run(this, lr):
    for group in this.engine.optimizer.param_groups:
        group["lr"] = lr
    found = []
    for _ in range(RUN):
        backward(this)
        this.engine.update(max_norm=SETTINGS.max_norm)
        found.append(largest(this.engine.attention().logits).item())
    return found


@pytest.mark.parametrize("name", ["MHA with biases", "GQA", pytest.param("MLA", marks=pytest.mark.slow)])
def test_a_run_that_exceeds_tau_without_is_held_about_tau_with(case, name):
    """Updates so large that logits grow to 23 and more; what one of them adds is above tau until the next clip."""
    free, held = (replace(MUONCLIP, qk_clip=QKClipConfig(tau=tau, alpha=0.5)) for tau in (1e9, TAU))
    free, held = (largest_of_a_run(case(name, settings), lr=0.1) for settings in (free, held))
    print(name, [round(x, 1) for x in free], [round(x, 1) for x in held])
    assert max(free) > 4 * TAU and min(free[RUN // 2 :]) > 1.5 * TAU
    assert max(held[RUN // 2 :]) < 1.5 * TAU


def test_a_run_goes_on_bitwise_from_a_checkpoint(case, tmp_path):
    whole = case("MLA")
    for step in range(3):
        whole.update(step)
    assert whole.attention.clipped > 0
    first = case("MLA")
    first.update(0)
    saved_alone(tmp_path).save(1, first.engine.state(), progress={"step": 1})
    second = case("MLA")
    saved_alone(tmp_path).restore(second.engine.state())
    for step in (1, 2):
        second.update(step)
    got, want = second.tensors(), whole.tensors()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def run_of(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        return schema.resolve(composed_by_hydra("train", overrides=["data=synthetic", "run_dir=x", *words]))


def test_muonclip_is_muon_with_the_published_tau():
    found = run_of("model=kimi_k2_tiny", "optim=muonclip").optim
    assert found.kind is OptimKind.muonclip and found.qk_clip == QKClipConfig(tau=100.0, alpha=0.5)
    assert found == replace(
        run_of("model=kimi_k2_tiny", "optim=muon").optim, kind=OptimKind.muonclip, qk_clip=found.qk_clip
    )
    other = run_of("optim=adamw_clip", "optim.qk_clip.tau=50").optim
    assert other == replace(run_of("optim=adamw").optim, qk_clip=QKClipConfig(tau=50.0, alpha=0.5))


@pytest.mark.parametrize(
    "words, said",
    [
        (["optim.kind=muonclip"], "optim.muon=null: must be given where optim.kind=muonclip"),
        (["optim=muon", "optim.kind=muonclip"], "optim.qk_clip=null: must be given, as optim=muonclip does"),
        (["optim=muonclip", "optim.kind=muon"], "optim.qk_clip={…}: must be null where optim.kind=muon"),
        (["optim=muonclip", "optim.qk_clip.tau=0"], "optim.qk_clip.tau=0.0: must be above 0"),
        (["optim=muonclip", "optim.qk_clip.alpha=2"], "optim.qk_clip.alpha=2.0: must be 0 to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(words, said):
    with pytest.raises(schema.ConfigError, match=said.replace("{", r"\{").replace(".", r"\.")):
        run_of("model=llama3_tiny", *words)


@pytest.mark.parametrize("name", ["qwen3_tiny", "olmo2_tiny", "llama4_scout_tiny", "qwen3_next_tiny", "gemma3_tiny"])
def test_models_that_normalise_queries_and_keys_are_refused_by_name(name):
    with pytest.raises(
        schema.ConfigError, match=r"^optim\.kind=muonclip: model\.blocks\.\w+\.attention\.qk_norm must be"
    ):
        schema.check(run_of(f"model={name}", "optim=muonclip"), world_size=1)
    check_clip(compose(name), MUON)


def test_a_model_without_attention_is_refused():
    config = compose("qwen3_next_tiny")
    kind = next(kind for kind, block in config.blocks.items() if block.deltanet is not None)
    only = replace(config, prefix=[], cycle=[kind])
    with pytest.raises(ValueError, match="softmax attention, which no layer of the model has"):
        check_clip(only, MUONCLIP)


def test_a_run_writes_the_largest_logit_and_how_many_heads_were_clipped(tmp_path):
    settings = [
        "model=kimi_k2_tiny", "optim=muonclip", "optim.qk_clip.tau=1e-3", "train.steps=2", "train.seq_len=16",
        "train.global_batch=2", "train.micro_batch=1", "train.eval_every=1", "train.eval_rows=1",
        "log.wandb=disabled", f"run_dir={tmp_path}",
    ]  # fmt: skip
    run = run_of(*settings)
    train(run, sizes=schema.check(run, world_size=1), place=World(rank=0, size=1, local_rank=0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    heads = sum(n for _, n in attending(run.model).values())
    for line in lines:
        assert line["max_attention_logit"] > 0 and 0 < line["clipped_heads"] <= heads


def test_small_models_of_this_file_are_what_their_names_say():
    assert attention()["attention"]["n_kv_heads"] == 2
    configs = {name: make().layers[-1] for name, make in EVERY.items()}
    assert configs["MHA with biases"].attention.n_heads == configs["MHA with biases"].attention.n_kv_heads
    assert configs["GQA with biases and sinks"].attention.bias and configs["GQA with biases and sinks"].attention.sinks
    assert configs["GQA with softcap and temperature"].attention.softcap is not None
    assert configs["MLA"].mla.q_rank and configs["MLA without q_rank"].mla.q_rank is None
