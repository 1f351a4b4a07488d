"""Three updates of a small DeepSeek-V3 in float64, sharded and replicated, against one process."""

import pytest
import torch
from distributed import run

from data.batch import Batch
from parallel import reduce
from parallel.apply import build, fill_fresh
from parallel.config import Dtype, ParallelConfig, PrecisionConfig
from parallel.config_fit import fit
from parallel.mesh import lay_out, open_mesh
from trainer import balance, optim
from trainer.config import OptimConfig, OptimKind, TrainConfig
from trainer.engine import TorchEngine, count
from zoo.config import BlockConfig, InitConfig, ModelConfig
from zoo.config_ff import MLPConfig, MoEConfig, RouterConfig, Score
from zoo.config_mixer import MLAConfig, NormConfig, RopeConfig

ROWS, LENGTH, VOCAB = 8, 12, 61


def config(tied):
    norm = NormConfig(eps=1e-6)
    rope = RopeConfig(theta=100.0, interleaved=True)
    mla = MLAConfig(n_heads=3, q_rank=10, kv_rank=6, nope_dim=4, rope_dim=2, v_dim=5, norm=norm, rope=rope)
    router = RouterConfig(
        score=Score.sigmoid, normalize=True, scale=2.5, n_groups=4, top_groups=2, balance_rate=0.01, balance_loss=0.05
    )
    moe = MoEConfig(n_experts=8, top_k=3, d_expert=6, d_shared=7, router=router)
    blocks = {"dense": BlockConfig(mla=mla, mlp=MLPConfig(d_ff=18)), "moe": BlockConfig(mla=mla, moe=moe)}
    return ModelConfig(
        family="deepseek_v3", d_model=14, n_layers=3, vocab_size=VOCAB, context=64, blocks=blocks, prefix=["dense"],
        cycle=["moe"], norm=norm, tied=tied, n_mtp=2, init=InitConfig(std=0.3),
    )  # fmt: skip


def rows(step):
    """Rows with uneven documents; in the second update the first half of the rows has no target at all."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 3), generator=generator)
    documents = (torch.rand(ROWS, LENGTH + 3, generator=generator) < 0.2).cumsum(1)

    def target(ahead):
        there = slice(ahead, ahead + LENGTH)
        result = tokens[:, there].where(documents[:, there] == documents[:, :LENGTH], -100)
        if step == 1:
            result[: ROWS // 2] = -100
        return result

    return Batch(
        tokens=tokens[:, :LENGTH],
        targets=target(1),
        positions=torch.arange(LENGTH).expand(ROWS, LENGTH),
        documents=documents[:, :LENGTH],
        mtp_tokens=torch.stack([tokens[:, k : k + LENGTH] for k in (1, 2)], dim=1),
        mtp_targets=torch.stack([target(k) for k in (2, 3)], dim=1),
    )


def mine(batch, mesh, micro):
    share = ROWS // mesh.sizes.dp
    first = mesh.dp_rank * share
    starts = range(first, first + share, micro)
    return [Batch(**{k: v[s : s + micro] for k, v in vars(batch).items()}) for s in starts]


def train(replicate, micro, tied):
    """Losses, norms, and everything that was updated, as whole tensors."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sizes = fit(ParallelConfig(dp_replicate=replicate, dp_shard=None), world_size=world_size)
    mesh = joined(sizes)
    model = build(config(tied), mesh=mesh, precision=PrecisionConfig(Dtype.fp64, Dtype.fp64))
    fill_fresh(model, seed=3)
    settings = TrainConfig(
        steps=3, global_batch=ROWS, micro_batch=micro, seq_len=LENGTH, max_norm=0.5, mtp_weight=0.3, loss_chunk=5,
        eval_every=0, eval_rows=1, sample_tokens=0, sample_prompt="",
    )  # fmt: skip
    adamw = OptimConfig(kind=OptimKind.adamw, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    engine = TorchEngine(model, mesh=mesh, train=settings, optim_config=adamw)
    numbers = []
    for step in range(3):
        batches = mine(rows(step), mesh, micro)
        terms = engine.forward_backward(batches, count(batches, mesh))
        norm = engine.update(max_norm=settings.max_norm)
        loads = balance.update(model, mesh)
        numbers.append([*terms.losses.tolist(), terms.balance.item(), norm.item(), *loads.flatten().tolist()])
    tensors = {name: reduce.whole(value.detach()).clone() for name, value in model.state_dict().items()}
    for name, state in optim.state(model, engine.optimizer).items():
        tensors |= {f"{name}/{key}": reduce.whole(value).clone() for key, value in state.items()}
    return numbers, tensors


def joined(sizes):
    """The mesh of a process that the test's harness has put into a group already."""
    if sizes.dp == 1:
        return open_mesh(sizes, rank=0, local_rank=0)
    return lay_out(sizes, device=torch.device("cpu"), rank=torch.distributed.get_rank())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("replicate, world_size", [(1, 2), (2, 4), (2, 2)])
def test_sharded_and_replicated_updates_equal_one_process(replicate, world_size, tied):
    torch.set_num_threads(1)
    numbers, tensors = train(1, 4, tied)
    for their_numbers, their_tensors in run(
        train, world_size=world_size, replicate=replicate, micro=2 if world_size == 2 else 1, tied=tied
    ):
        torch.testing.assert_close(torch.tensor(their_numbers), torch.tensor(numbers), rtol=1e-9, atol=0)
        largest = max(tensor.abs().max() for tensor in tensors.values())
        assert their_tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            limit = 1e-9 * tensor.abs().max() + 1e-12 * largest
            assert (their_tensors[name] - tensor).abs().max() <= limit, name
