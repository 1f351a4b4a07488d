"""Feed-forwards with experts on several ranks in float64, against one process: values, gradients, counts."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run
from sharing import FAMILIES, Case, random_value

from parallel.comm import Lane
from parallel.config import ParallelConfig, Remat
from parallel.expert import join_routers, share_experts
from parallel.plan import Kind, find, share
from parallel.remat import recomputed
from parallel.tensor import share_layers
from zoo.context import Context
from zoo.decoder import Decoder

ROWS, LENGTH = 4, 8
MOE = ["deepseek_v3", "qwen3_moe", "llama4_maverick", "gpt_oss", "qwen3_next", "grok2", "glm45"]


@dataclass
class Layout:
    """Sizes of axes; a rank's number counts dp, cp and tp, innermost last."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: bool = True

    @property
    def ranks(self):
        return self.dp * self.cp * self.tp

    def lines(self, axis):
        """Ranks that are neighbours along an axis."""
        grid = torch.arange(self.ranks).view(self.dp, self.cp, self.tp)
        if axis == "tp":
            return grid.flatten(0, 1).tolist()
        if axis == "cp":
            return grid.transpose(1, 2).flatten(0, 1).tolist()
        if self.expert_tp:
            return grid.permute(2, 0, 1).reshape(-1, self.ep).tolist()
        return grid.reshape(-1, self.ep).tolist()

    def lane(self, axis):
        """The groups of an axis are made on all ranks."""
        found = None
        for line in self.lines(axis):
            group = dist.new_group(line)
            if dist.get_rank() in line:
                found = Lane(group, line.index(dist.get_rank()), len(line))
        return None if found is None or found.size == 1 else found

    def own(self, x, rank):
        """Rows of dp; tokens of cp, then of tp."""
        x = x.chunk(self.dp)[rank // (self.cp * self.tp)]
        x = x.chunk(self.cp, dim=1)[rank // self.tp % self.cp]
        return x.chunk(self.tp, dim=1)[rank % self.tp]


LAYOUTS = {
    "ep2": Layout(dp=2, ep=2),
    "ep4": Layout(dp=4, ep=4),
    "ep2_edp2": Layout(dp=4, ep=2),
    "ep2_tp2": Layout(dp=2, tp=2, ep=2),
    "ep2_cp2": Layout(cp=2, ep=2),
    "ep4_cp2": Layout(dp=2, cp=2, ep=4),
    "ep2_whole_tp2": Layout(tp=2, ep=2, expert_tp=False),
    "ep4_whole_tp2": Layout(dp=2, tp=2, ep=4, expert_tp=False),
    "ep2_whole_dp2_tp2": Layout(dp=2, tp=2, ep=2, expert_tp=False),
    "ep4_whole_cp2_tp2": Layout(cp=2, tp=2, ep=4, expert_tp=False),
    "cp2_tp2": Layout(cp=2, tp=2),
}


def piece(name, whole, config, layout, rank):
    """Where a rank's part of a parameter lies."""
    expert = find(name, config=config).kind is Kind.expert
    part = [slice(None)] * whole.dim()
    of = share(name, whole.shape, config=config, size=layout.tp, rank=rank % layout.tp)
    if of.dim is not None and (layout.expert_tp or not expert):
        part[of.dim] = of.part
    if expert:
        (place,) = [line.index(rank) for line in layout.lines("ep") if rank in line]
        n = whole.shape[0] // layout.ep
        part[0] = slice(place * n, (place + 1) * n)
    return tuple(part)


def layer(family):
    """Config of a family with three quarters of the experts of a group to choose, and the number of its first moe."""
    config = FAMILIES[family]()
    return config, next(number for number, block in enumerate(config.layers) if block.moe is not None)


def spread(config, layout):
    """A model on this rank."""
    rank, lanes = dist.get_rank(), {axis: layout.lane(axis) for axis in ("cp", "tp", "ep")}
    with torch.device("meta"):
        model = Decoder(config).to(torch.float64)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if lanes["tp"] is not None:
        places = {}
        for name, shape in shapes.items():
            of = share(name, shape, config=config, size=layout.tp, rank=rank % layout.tp)
            if find(name, config=config).kind is Kind.expert and not layout.expert_tp:
                of = replace(of, dim=None)
            places[name] = SimpleNamespace(tp=of)
        share_layers(model, lanes["tp"], places=places)
    if lanes["ep"] is not None:
        share_experts(model, lanes["ep"], tp=lanes["tp"], expert_tp=layout.expert_tp)
    rows = [lanes["cp"], None if layout.expert_tp else lanes["tp"]]
    join_routers(model, tuple(lane for lane in rows if lane is not None))
    model.to_empty(device="cpu")
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    for name, parameter in model.named_parameters():
        value = random_value(name, shapes[name])
        part = value[piece(name, value, config, layout, rank)]
        assert part.shape == parameter.shape, f"{name=} {part.shape=} {parameter.shape=}"
        parameter.data.copy_(part)
    return model


def feed_forward(block, h, context):
    return block._feed_forward(h, context)


def states(d_model):
    h = torch.randn(ROWS, LENGTH, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return h, torch.randn(h.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def results(model, number, h, grad, remat=Remat.none):
    """What a layer makes of states, gradients, counts and its part of the balance loss."""
    h = h.clone().requires_grad_()
    positions = torch.arange(h.shape[1]).expand(h.shape[:2])
    context = Context(positions, None, h.dtype, LENGTH, torch.tensor(float(ROWS), dtype=torch.float64))
    block = model.blocks[str(number)]
    forward = feed_forward if remat is Remat.none else recomputed(feed_forward, how=remat)
    y, tally = forward(block, h, context)
    y.backward(grad)
    prefix = f"blocks.{number}."
    grads = {prefix + name: parameter.grad for name, parameter in block.named_parameters()}
    grads = {name: grad for name, grad in grads.items() if grad is not None}
    return y.detach(), h.grad, grads, tally.load, (tally.balance + tally.z) * block.moe.balance_share


def on_ranks(layout, families, remat=Remat.none):
    torch.set_num_threads(1)
    found = {}
    for family in families:
        config, number = layer(family)
        model = spread(config, layout)
        h, grad = (layout.own(x, dist.get_rank()) for x in states(config.d_model))
        found[family] = results(model, number, h, grad, remat)
    return found


def alone(family):
    config, number = layer(family)
    model = Decoder(config).to(torch.float64)
    for name, parameter in model.named_parameters():
        parameter.data = random_value(name, parameter.shape)
    h, grad = states(config.d_model)
    return results(model, number, h, grad)


def close(got, want, name=""):
    assert got.dtype == want.dtype
    gap, size = (got - want).abs().max(), want.abs().max()
    assert gap <= 1e-11 * size + 1e-13, (name, gap, size)


def check(layout, families, remat=Remat.none):
    ranks = run(on_ranks, world_size=layout.ranks, timeout=300, layout=layout, families=families, remat=remat)
    for family in families:
        config, _ = layer(family)
        y, d_h, grads, load, balance = alone(family)
        sums = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        for rank, (their_y, their_d_h, their_grads, *_) in enumerate(found[family] for found in ranks):
            close(their_y, layout.own(y, rank), f"{family} y")
            close(their_d_h, layout.own(d_h, rank), f"{family} h")
            for name, grad in their_grads.items():  # every gradient is a sum over ranks
                sums[name][piece(name, sums[name], config, layout, rank)] += grad
        for name, grad in grads.items():
            close(sums[name], grad, f"{family} {name}")
        copies = layout.tp if layout.expert_tp else 1  # ranks that choose for the same tokens
        assert torch.equal(sum(found[family][3] for found in ranks), load * copies), family
        assert balance > 0
        close(sum(found[family][4] for found in ranks), balance, f"{family} balance loss")


FAST = ["ep2", "ep2_tp2", "ep4_whole_tp2", "ep4_whole_cp2_tp2"]


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in FAST)]
)
def test_layers_with_experts_on_several_ranks_do_what_one_process_does(name):
    check(LAYOUTS[name], MOE)


@pytest.mark.parametrize("remat", [Remat.block, Remat.selective])
def test_tokens_travel_again_where_a_layer_is_recomputed(remat):
    check(LAYOUTS["ep4_whole_tp2"], ["deepseek_v3", "gpt_oss"], remat)


def updates(plans):
    """Losses, norms and loads of two updates, under each plan."""
    found = []
    for plan in plans:
        case = Case("qwen3_moe", plan)
        found.append([case.update(step) for step in range(2)])
    return found


def test_recomputation_passes_over_what_fsdp_does_around_experts():
    plans = [ParallelConfig(dp_replicate=1, dp_shard=2, ep=2, remat=remat) for remat in Remat]
    for plain, *others in run(updates, world_size=2, plans=plans):
        assert others == [plain] * len(others)
