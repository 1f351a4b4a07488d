"""Bytes of every collective of one update on gloo, by axis, are those of the formulas in docs/parallel.md."""

from collections import Counter

import pytest
import torch
from distributed import run
from sharing import FAMILIES, LENGTH, ROWS, Case

from parallel.config import ContextMethod, ParallelConfig, PipelineConfig, Remat, Reshard, ScheduleName
from parallel.config_fit import stages_a_rank
from parallel.expert import ExpertDispatcher
from parallel.layout import is_expert
from parallel.partition import parts, rank_of
from parallel.plan import share
from planner.wire import Wire
from trainer import balance, optim
from zoo.decoder import Decoder

E = 8  # bytes of a number in float64, of parameters and states alike
BOTH = ("llama3", "deepseek_v3")


def piped(schedule, microbatches=None, **more):
    return ParallelConfig(1, 2, pp=2, pipeline=PipelineConfig(ScheduleName[schedule], microbatches), **more)


PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), BOTH),
    "fsdp 2 always": (ParallelConfig(1, 2, reshard=Reshard.always), BOTH),
    "fsdp 2 never": (ParallelConfig(1, 2, reshard=Reshard.never), BOTH),
    "tp 2": (ParallelConfig(1, 1, tp=2), BOTH),
    "tp 2 again": (ParallelConfig(1, 1, tp=2, remat=Remat.block), BOTH),
    "ep 2": (ParallelConfig(1, 2, ep=2), ("deepseek_v3",)),
    "ep 2 again": (ParallelConfig(1, 2, ep=2, remat=Remat.block), ("deepseek_v3",)),
    "cp 2 gather": (ParallelConfig(1, 1, cp=2), BOTH),
    "cp 2 gather again": (ParallelConfig(1, 1, cp=2, remat=Remat.block), BOTH),
    "cp 2 ring": (ParallelConfig(1, 1, cp=2, context=ContextMethod.ring), BOTH),
    "pp 2 x fsdp 2 1f1b": (piped("1f1b"), BOTH),
    "pp 2 x fsdp 2 1f1b in two runs": (piped("1f1b", 2), ("deepseek_v3",)),
    "pp 2 x fsdp 2 1f1b always": (piped("1f1b", reshard=Reshard.always), ("deepseek_v3",)),
    "pp 2 x fsdp 2 interleaved": (piped("interleaved"), ("deepseek_v3",)),
    "pp 2 x fsdp 2 zbv": (piped("zbv"), BOTH),
    "pp 2 x fsdp 2 dualpipev": (piped("dualpipev"), BOTH),
}


def sent(names, plan):
    """Of each family: what this rank sends in an update, and how many rows leave it for experts elsewhere."""
    torch.set_num_threads(1)
    results, left = {}, []
    dispatch = ExpertDispatcher.dispatch

    def counting(self, x, chosen, *, n_experts, **more):
        left.append(int((chosen // (n_experts // self.lane.size) != self.lane.rank).sum()))
        return dispatch(self, x, chosen, n_experts=n_experts, **more)

    ExpertDispatcher.dispatch = counting
    for name in names:
        case = Case(name, plan)
        if plan.pp > 1:
            case.update(0)  # the first one opens what stages talk over
        left.clear()
        wire = Wire(case.mesh)
        with wire:
            case.update(1)
        results[name] = {(line.axis, line.operation): line.sent for line in wire.lines.values()}, sum(left)
    return results


def all_reduce(numbers, n):
    return 2 * (n - 1) * numbers * E // n


class Formulas:
    """docs/parallel.md of one rank, in two micro-batches, or in as many as there are rows under a pipeline."""

    def __init__(self, config, plan, rank):
        self.config, self.plan = config, plan
        self.fsdp = plan.dp_shard * plan.cp
        self.rows = ROWS // plan.dp_shard
        self.microbatches = self.rows if plan.pp > 1 else 2
        self.tokens = self.rows * LENGTH // (plan.cp * plan.tp)  # of this rank, in all micro-batches
        self.layers, self.passes = config.n_layers + config.n_mtp, 1 + config.n_mtp
        self.place, self.piece = rank // self.fsdp, rank % self.fsdp  # along pp, along fsdp
        self.n_stages = plan.pp * stages_a_rank(plan.pipeline) if plan.pp > 1 else 1
        self.again = plan.remat is not Remat.none  # layers run again in the backward
        self.found = Counter()

    def bytes(self, left, arrived):
        self.parameters()
        self.sums()
        if self.plan.tp > 1:
            self.tensor()
        if self.plan.ep > 1:
            self.experts(left, arrived)
        if self.plan.cp > 1:
            self.context()
        if self.plan.pp > 1:
            self.pipeline()
        return {key: n for key, n in self.found.items() if n}

    def stages(self):
        """Numbers of the stages of this rank, and their parts on the meta device."""
        cut = parts(self.config, n_stages=self.n_stages, seq_len=LENGTH) if self.plan.pp > 1 else [None]
        with torch.device("meta"):
            return {
                number: Decoder(self.config) if part is None else Decoder(self.config, part)
                for number, part in enumerate(cut)
                if part is None or rank_of(number, self.plan.pipeline.schedule, pp=self.plan.pp) == self.place
            }

    def parameters(self):
        """(F − 1) s for each gathering and for the one reduction; experts are over edp, which is one rank here."""
        axis = {"cp": "cp = fsdp", "ep": "ep = dp_shard"}.get(self.cut(), "dp_shard")
        for stage in self.stages().values():
            for name, p in stage.named_parameters():
                if self.plan.ep > 1 and is_expert(name, config=self.config):
                    continue
                padded = -(-p.shape[0] // self.fsdp) * p[0].numel() * E
                times = self.gatherings(rest=not name.startswith(("blocks.", "mtp.")))
                self.found[axis, "all-gather"] += (self.fsdp - 1) * padded * times
                self.found[axis, "reduce-scatter"] += (self.fsdp - 1) * padded

    def gatherings(self, *, rest):
        """How often a group's parameters are gathered in an update."""
        always, a = self.plan.reshard is Reshard.always, self.microbatches
        if self.plan.pp > 1:
            n = self.plan.pipeline.microbatches or a
            return a // n * (n + 1 if always else 1)
        if self.plan.reshard is Reshard.never or (rest and not always):
            return a
        return 2 * a

    def cut(self):
        return next((axis for axis in ("pp", "tp", "ep", "cp") if vars(self.plan)[axis] > 1), "dp_shard")

    def sums(self):
        """Counts over dp; losses (three of no prediction) and loads over all but tp, all have these; norms over all."""
        routers = len(balance.routers(self.config))
        loads = routers * max([layer.moe.n_experts for layer in self.config.layers if layer.moe], default=0)
        names = {"pp": "losses", "tp": "tp", "ep": "ep = dp_shard", "cp": "cp = fsdp", "dp_shard": "dp_shard"}
        everyone, world = names[self.cut()], self.plan.pp * self.fsdp * self.plan.tp
        dp = "dp_shard" if self.cut() == "pp" else everyone
        self.found[dp, "all-reduce"] += all_reduce(self.passes + 1, self.plan.dp_shard)
        self.found[everyone, "all-reduce"] += all_reduce(self.passes + 3 + loads, world // self.plan.tp)
        self.found[everyone, "all-reduce"] += all_reduce(len(optim.shapes(self.config)), world)

    def tensor(self):
        """A layer 4 m and 4 m, 3 m again; embedding and head 2 m each; the loss 3 numbers a token; whole parameters."""
        tp = self.plan.tp
        m = (tp - 1) * self.tokens * self.config.d_model * E  # tokens are T/tp
        for each in ("all-gather", "reduce-scatter"):
            self.found["tp", each] += m * (4 * self.layers + 2 * self.passes)
        self.found["tp", "all-gather"] += 2 * m * self.layers * self.again
        self.found["tp", "reduce-scatter"] += m * self.layers * self.again  # nothing needs what the last one gives
        (stage,) = self.stages().values()
        shares = [
            (p.numel(), share(name, p.shape, config=self.config, size=tp, rank=0))
            for name, p in stage.named_parameters()
        ]
        whole = sum(numel for numel, mine in shares if mine.dim is None)
        self.found["tp", "all-reduce"] += all_reduce(3 * self.tokens * tp * self.passes + whole, tp)

    def experts(self, left, arrived):
        """Rows there and back, forward, backward and maybe again: as often those that leave as that come; counts."""
        travels = len(balance.routers(self.config)) * self.microbatches * (1 + self.again)
        counts = travels * self.config.layers[-1].moe.n_experts * 8 * (self.plan.ep - 1) // self.plan.ep
        rows = 2 * (left + arrived) * self.config.d_model * E  # where layers run again, each counts its rows twice
        rows -= rows // 4 if self.again else 0
        self.found["ep = dp_shard", "all-to-all"] += rows + counts

    def context(self):
        """Keys and values, or latents, of a layer: gathered forward, scattered backward; counts of a row's choices."""
        cp, block = self.plan.cp, self.config.layers[-1]
        rings = self.plan.context is ContextMethod.ring
        if block.mla is not None and rings:
            width = block.mla.n_heads * (block.mla.nope_dim + block.mla.rope_dim + block.mla.v_dim)
        elif block.mla is not None:
            width = block.mla.kv_rank + block.mla.rope_dim
        else:
            width = block.attention.n_kv_heads * 2 * block.attention.head_dim
        if rings:  # forward to all but one; in the backward again, and gradients to all
            self.found["cp = fsdp", "send"] += (3 * cp - 2) * self.tokens * width * E * self.layers
        for each in () if rings else ("all-gather", "reduce-scatter"):
            passes = 2 if self.again and each == "all-gather" else 1
            self.found["cp = fsdp", each] += (cp - 1) * self.tokens * width * E * self.layers * passes
        routers = balance.routers(self.config)
        counts = 2 * block.moe.n_experts + block.moe.router.n_groups if routers else 0  # of V3's loss, and of V2's
        counts *= len(routers) * self.rows * (1 + self.again)
        self.found["cp = fsdp", "all-reduce"] += all_reduce(counts, cp)

    def pipeline(self):
        """N·D numbers for each micro-batch and neighbour on another rank; the embedding, where two ranks have it."""
        schedule, pp = self.plan.pipeline.schedule, self.plan.pp
        for number in self.stages():
            for other in (number - 1, number + 1):
                if 0 <= other < self.n_stages and rank_of(other, schedule, pp=pp) != self.place:
                    self.found["pp", "send"] += self.tokens * self.config.d_model * E
        ends = [rank_of(number, schedule, pp=pp) for number in (0, self.n_stages - 1)]
        if (self.config.tied or self.config.n_mtp) and ends[0] != ends[1] and self.place in ends:
            rows = -(-self.config.vocab_size // self.fsdp)
            mine = min(rows, self.config.vocab_size - rows * self.piece)  # without padding
            self.found["pp", "send"] += mine * self.config.d_model * E


SLOW = {title for title in PLANS if title.endswith((" runs", "1f1b always", "interleaved", "again"))}


@pytest.mark.parametrize("title", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in PLANS])
def test_an_update_sends_what_the_documentation_says(title):
    plan, names = PLANS[title]
    results = run(sent, world_size=plan.pp * plan.dp_shard * plan.cp * plan.tp, names=names, plan=plan)
    for name in names:
        rows = [result[name][1] for result in results]
        for rank, result in enumerate(results):
            arrived = sum(rows) - rows[rank]  # two ranks: what leaves one comes to the other
            assert result[name][0] == Formulas(FAMILIES[name](), plan, rank).bytes(rows[rank], arrived), (name, rank)
