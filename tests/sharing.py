"""Small models of many families, and updates of them under any plan, for tests of shared layers."""

from dataclasses import replace

import torch
from models import compose

from data.batch import Batch
from parallel import reduce
from parallel.apply import build, fill
from parallel.config import Dtype, ParallelConfig, PrecisionConfig
from parallel.config_fit import fit
from parallel.mesh import lay_out, open_mesh
from trainer import balance
from trainer.config import OptimConfig, OptimKind, TrainConfig
from trainer.config_clip import QKClipConfig
from trainer.config_muon import MuonConfig
from trainer.engine import TorchEngine, count
from trainer.evaluate import evaluate

ROWS, LENGTH, VOCAB = 8, 16, 61  # no number of ranks divides the vocabulary

SETTINGS = TrainConfig(
    steps=3, global_batch=ROWS, micro_batch=1, seq_len=LENGTH, max_norm=0.5, mtp_weight=0.3, loss_chunk=5,
    eval_every=0, eval_rows=1, sample_tokens=0, sample_prompt="",
)  # fmt: skip
ADAMW = OptimConfig(kind=OptimKind.adamw, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
NUMBERS = MuonConfig(momentum=0.95, nesterov=True, ns_steps=5, coefficients=[3.4445, -4.775, 2.0315], update_rms=0.2)
MUON = replace(ADAMW, kind=OptimKind.muon, lr=0.002, muon=NUMBERS)  # as optim=muon
MUONCLIP = replace(MUON, kind=OptimKind.muonclip, qk_clip=QKClipConfig(tau=0.5, alpha=0.5))  # far below 100
ALONE = ParallelConfig(dp_replicate=1, dp_shard=1)
EXACT = PrecisionConfig(Dtype.fp64, Dtype.fp64)

HEADS = {"n_heads": 8, "head_dim": 8}
SHRINK = {"d_model": 20, "vocab_size": VOCAB, "n_layers": 3, "init__std": 0.25}
EXPERTS = {"n_experts": 8, "top_k": 3, "d_expert": 8}
BALANCE = {"router__balance_rate": 0.01, "router__balance_loss": 0.01}
DEVICES = {"router__device_loss": {"expert": 0.01, "device": 0.02, "communication": 0.03}, "router__z_loss": 0.01}
SWITCH = {"router__switch_loss": {"weight": 0.02, "scope": "global_batch"}, "router__z_loss": 0.01}


def shrunk(name, parts, **model):
    """A shipped model with small widths; ``parts`` are values of a slot in every kind of layer that fills it."""
    base = compose(name)
    changes = dict(SHRINK) | model
    for kind, block in base.blocks.items():
        for slot, values in parts.items():
            if getattr(block, slot) is not None:
                changes |= {f"blocks__{kind}__{slot}__{key}": value for key, value in values.items()}
    return compose(name, **changes)


def attention(n_kv_heads=2, **more):
    return {"attention": HEADS | {"n_kv_heads": n_kv_heads} | more, "mlp": {"d_ff": 24}}


def llama3():
    return shrunk("llama3_tiny", attention())


def deepseek_v3():
    mla = {"n_heads": 4, "q_rank": 10, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
    moe = EXPERTS | {"d_shared": 12, "router__n_groups": 4, "router__top_groups": 2} | BALANCE | DEVICES
    return shrunk("deepseek_v3_tiny", {"mla": mla, "mlp": {"d_ff": 24}, "moe": moe}, n_mtp=2)


def qwen3_moe():
    return shrunk("qwen3_moe_tiny", attention() | {"moe": EXPERTS | BALANCE | SWITCH})


def gemma3():
    return shrunk("gemma3_tiny", attention(), n_layers=7)


def llama4_maverick():
    moe = EXPERTS | {"top_k": 1, "d_shared": 12} | BALANCE
    return shrunk("llama4_maverick_tiny", attention() | {"moe": moe}, n_layers=4)


def gpt_oss():
    return shrunk("gpt_oss_tiny", attention() | {"moe": EXPERTS | BALANCE})


def qwen3_next():
    deltanet = {"n_k_heads": 4, "n_v_heads": 8, "k_dim": 6, "v_dim": 5}
    moe = EXPERTS | {"d_shared": 12} | BALANCE
    eps = {"norm__eps": 1e-2}  # as in tests/draws_moe.py: what is divided by stays away from zero
    return shrunk("qwen3_next_tiny", attention() | {"deltanet": deltanet | eps, "moe": moe}, n_layers=4)


def olmo2():
    return shrunk("olmo2_tiny", attention(n_kv_heads=2))


def grok2():
    return shrunk("grok2_tiny", attention() | {"moe": EXPERTS | {"top_k": 2} | BALANCE}, n_layers=2)


def glm45():
    return shrunk("glm45_tiny", attention() | {"moe": EXPERTS | {"d_shared": 12} | BALANCE})


def gpt2():
    return shrunk("gpt2_tiny", attention(n_kv_heads=8), context=18)


def chameleon():
    return shrunk("chameleon_tiny", attention(n_kv_heads=2))


FAMILIES = {
    family.__name__: family
    for family in (
        llama3, deepseek_v3, qwen3_moe, gemma3, llama4_maverick, gpt_oss,
        qwen3_next, olmo2, grok2, glm45, gpt2, chameleon,
    )
}  # fmt: skip


def rows(step, n_mtp):
    """Rows with uneven documents; in the second update the first half of the rows has no target at all."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + n_mtp + 1), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < 0.2).cumsum(1)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(tokens.shape[1]).expand_as(documents)
    positions = places - places.where(begins, 0).cummax(dim=1).values

    def target(ahead):
        there = slice(ahead, ahead + LENGTH)
        result = tokens[:, there].where(documents[:, there] == documents[:, :LENGTH], -100)
        if step == 1:
            result[: ROWS // 2] = -100
        return result

    depths = range(1, n_mtp + 1)
    none = torch.zeros(ROWS, 0, LENGTH, dtype=torch.int64)
    return Batch(
        tokens=tokens[:, :LENGTH],
        targets=target(1),
        positions=positions[:, :LENGTH],
        documents=documents[:, :LENGTH],
        mtp_tokens=torch.stack([tokens[:, k : k + LENGTH] for k in depths], dim=1) if n_mtp else none,
        mtp_targets=torch.stack([target(k + 1) for k in depths], dim=1) if n_mtp else none,
    )


def mine(batch, mesh, size=None):
    """This rank's rows in two micro-batches, or of ``size`` rows; of one row where they go through pipeline stages."""
    share = ROWS // mesh.sizes.dp
    first, size = mesh.dp_rank * share, size or (1 if mesh.sizes.pp > 1 else share // 2)
    starts = range(first, first + share, size)
    return [Batch(**{k: v[s : s + size] for k, v in vars(batch).items()}) for s in starts]


def joined(sizes):
    """The mesh of a process that the test's harness has put into a group already."""
    if sizes.ranks == 1:
        return open_mesh(sizes, rank=0, local_rank=0)
    return lay_out(sizes, device=torch.device("cpu"), rank=torch.distributed.get_rank())


def random_value(name, shape):
    """Every number random, so that biases, sinks and weights of norms matter."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + len(name))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * drawn
    return 0.25 * drawn


class Case:
    """A small model of a family, or a config, with random values, and what updates it by ``micro`` rows."""

    def __init__(self, name, plan=ALONE, precision=EXACT, compiler="aot_eager", optim_config=ADAMW, micro=None):
        self.config, self.micro = FAMILIES[name]() if isinstance(name, str) else name, micro
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.mesh = joined(fit(plan, world_size=world_size))
        self.model = build(
            self.config, mesh=self.mesh, precision=precision, plan=plan, seq_len=LENGTH, compiler=compiler
        )
        fill(reduce.views(self.model, self.model.state_dict()), random_value)
        self.engine = TorchEngine(self.model, mesh=self.mesh, train=SETTINGS, optim_config=optim_config)
        self.engine.filled()
        self.attention = None

    def update(self, step):
        """One update; losses, norm and loads."""
        batches = mine(rows(step, self.config.n_mtp), self.mesh, self.micro)
        terms = self.engine.forward_backward(batches, count(batches, self.mesh))
        norm = self.engine.update(max_norm=SETTINGS.max_norm)
        self.attention = self.engine.attention()
        loads = balance.update(self.model, self.mesh)
        loads = [] if loads is None else loads.flatten().tolist()
        logits = [] if self.attention is None else torch.cat([*self.attention.logits.values()]).tolist()
        return [*terms.losses.tolist(), terms.balance.item(), terms.router_z.item(), norm.item(), *loads, *logits]

    def evaluate(self, step):
        """Mean loss of rows, a part of which this rank has."""
        return evaluate(self.engine, mine(rows(step, self.config.n_mtp), self.mesh), self.mesh)

    def tensors(self):
        """Everything that is updated and that this rank has a part of, as whole tensors."""
        state = self.engine.state()
        tensors = {name: reduce.whole(value.detach()).clone() for name, value in state["model"].items()}
        for name, moments in state["optimizer"].items():
            tensors |= {f"{name}/{key}": reduce.whole(value).clone() for key, value in moments.items()}
        return tensors


def merged(parts):
    """Tensors of all ranks together; what several have is bitwise the same."""
    tensors = {}
    for part in parts:
        for name, x in part.items():
            assert torch.equal(tensors.setdefault(name, x), x), f"{name}: ranks differ"
    return tensors


def same(got, want):
    """Compare tensors; the worst difference relative to the larger of a tensor and a thousandth of the largest."""
    assert got.keys() == want.keys()
    largest, far = max(tensor.abs().max() for tensor in want.values()), 0.0
    for name, tensor in want.items():
        gap, size = (got[name] - tensor).abs().max(), tensor.abs().max()
        assert got[name].dtype == tensor.dtype and gap <= 1e-9 * size + 1e-12 * largest, (name, gap, size)
        far = max(far, (gap / (size + 1e-3 * largest)).item())
    return far
