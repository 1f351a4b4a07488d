"""Small models in float64 as pipeline stages, and their updates: ``from piping import Case, alone, joined``."""

from functools import partial

import torch
from sharing import ADAMW, FAMILIES, LENGTH, ROWS, VOCAB, random_value

from parallel.config import ParallelConfig, PipelineConfig, Remat, ScheduleName
from parallel.config_fit import Sizes
from parallel.fsdp import shard
from parallel.layout import stored_name
from parallel.mesh import lay_out
from parallel.partition import stages_of
from parallel.pipeline import Pipeline
from parallel.remat import recomputed
from trainer import optim
from trainer.loss import cross_entropy
from zoo.block import Block
from zoo.decoder import Decoder, Objective

SCHEDULES = ["1f1b", "interleaved", "zbv", "dualpipev"]
FP64 = torch.float64
WEIGHTS = torch.tensor([1.0, 0.2, 0.1], dtype=FP64)  # of the main loss and of each depth


def plan_of(schedule, virtual=2):
    return PipelineConfig(schedule=ScheduleName(schedule), virtual=virtual)


def work(step, config, rows):
    """Tokens, and all else by keyword, of rows of a global batch, with uneven documents; some have no target at all."""
    generator = torch.Generator().manual_seed(step)

    def drawn(*shape):
        return torch.randint(0, VOCAB, (2 * ROWS, *shape), generator=generator)

    documents = (torch.rand(2 * ROWS, LENGTH, generator=generator) < 0.2).cumsum(1)
    places = torch.arange(LENGTH).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = places - places.where(begins, 0).cummax(dim=1).values
    tokens, targets = drawn(LENGTH), drawn(LENGTH)
    further, further_targets = drawn(config.n_mtp, LENGTH), drawn(config.n_mtp, LENGTH)
    targets[:, step % 5 :: 3] = -100
    targets[: ROWS if step == 1 else 1] = -100
    loss = partial(cross_entropy, chunk=11)
    rows_of_all = torch.tensor(2.0 * ROWS, dtype=FP64)
    objective = Objective(targets[rows], further[rows], further_targets[rows], rows_of_all, loss)
    return tokens[rows], {"positions": positions[rows], "documents": documents[rows], "objective": objective}


def weigh(losses):
    return (losses * WEIGHTS[: len(losses)]).sum() / 97


def decoder(config, part=None, *, params=FP64, compute=FP64):
    model = Decoder(config, part).to(params)
    model.compute_dtype = compute
    with torch.no_grad():
        for name, x in model.state_dict().items():
            x.copy_(random_value(name, x.shape))
    return model.train()


class Case:
    """One rank of a model in stages, with what updates it.

    Its other ranks read the same rows, or under FSDP each group of pp its share of them.
    """

    def __init__(
        self, family, schedule, *, pp, dp=1, n=4, runs=1, virtual=2, remat=Remat.none, reshard=None, params=FP64,
        compute=FP64,
    ):  # fmt: skip
        torch.set_num_threads(1)
        self.config, plan = FAMILIES[family](), plan_of(schedule, virtual)
        rank = torch.distributed.get_rank()
        self.mesh = lay_out(Sizes(1, dp, pp=pp), device=torch.device("cpu"), rank=rank)
        self.lane, self.n, self.runs = self.mesh.lane("pp"), n, runs
        cut = stages_of(self.config, plan, pp=pp, rank=self.lane.rank, seq_len=LENGTH)
        dtypes = {"params": params, "compute": compute}
        stages = {number: decoder(self.config, part, **dtypes) for number, part in cut.items()}
        settings = ParallelConfig(1, dp, pp=pp, pipeline=plan, remat=remat)
        if reshard is not None:
            settings.reshard = reshard
        for stage in stages.values():
            if remat is not Remat.none:
                again(stage, remat)
            if dp > 1:
                shard(stage, self.mesh, plan=settings, **dtypes)
        self.model = Pipeline(
            self.config, stages, plan=plan, lane=self.lane, device=self.mesh.device, recomputes=remat is not Remat.none
        )
        share = 2 * ROWS // dp
        self.rows = slice(self.mesh.dp_rank * share, (self.mesh.dp_rank + 1) * share)
        self.optimizer = optim.build(self.model, ADAMW)

    def gradients(self, step):
        """Add them up; the losses."""
        tokens, given = work(step, self.config, self.rows)
        share, losses = len(tokens) // self.runs, []
        for i in range(self.runs):
            part = slice(i * share, (i + 1) * share)
            o = given["objective"]
            losses.append(
                self.model.run(
                    tokens[part],
                    positions=given["positions"][part],
                    documents=given["documents"][part],
                    objective=Objective(o.targets[part], o.mtp_tokens[part], o.mtp_targets[part], o.rows, o.loss),
                    n=self.n,
                    weigh=weigh,
                    last=i == self.runs - 1,
                )
            )
        self.model.sum_copies()
        return torch.stack(losses).sum(0)

    def update(self, step):
        losses = self.gradients(step)
        found = {name: whole(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, found

    def values(self):
        return {name: whole(p) for name, p in self.model.named_parameters()}


def again(stage, remat):
    """Blocks that compute again in the backward, as ``parallel.apply`` makes them."""
    forward = recomputed(Block.forward, how=remat)

    def run(block, x, context):
        return forward(block, x, context) if torch.is_grad_enabled() else Block.forward(block, x, context)

    for block in [*stage.layers(), *(mtp.block for mtp in stage.depths())]:
        block.__class__ = type("Again", (type(block),), {"forward": run})


def whole(x):
    x = x.detach()
    return (x.full_tensor() if isinstance(x, torch.distributed.tensor.DTensor) else x).clone()


def counts(model):
    return {name: torch.cat([r.load, r.balance_value[None]]).clone() for name, r in model.routers().items()}


def alone(family, steps):
    """What one process finds: losses, first gradients, router counts, values after ``steps``, and what it says then."""
    torch.set_num_threads(1)
    config = FAMILIES[family]()
    model = decoder(config)
    optimizer, losses, first = optim.build(model, ADAMW), [], {}
    for step in range(steps):
        tokens, given = work(step, config, slice(None))
        result = model(tokens, **given)
        weigh(result).backward()
        losses.append(result.detach())
        if step == 0:
            first = {name: p.grad.clone() for name, p in model.named_parameters()}
            counted = counts(model)
        optimizer.step()
        optimizer.zero_grad()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return torch.stack(losses), first, counted, values, evaluated(model, config)


def evaluated(model, config):
    model.eval()
    with torch.no_grad():
        tokens, given = work(9, config, slice(0, 3))
        logits, lengths = model(tokens[:, :11]), model(tokens, documents=given["documents"])
        return [logits.clone(), lengths.clone(), model(tokens, **given).clone()]


def piped(family, steps, **settings):
    """The same of one rank of a pipeline."""
    case = Case(family, **settings)
    losses, first = [], {}
    for step in range(steps):
        loss, gradients = case.update(step)
        losses.append(loss)
        if step == 0:
            first, counted = gradients, counts(case.model)
    names = {"copies": case.model.copies, "stored": list(case.model.state_dict())}
    return torch.stack(losses), first, counted, case.values(), evaluated(case.model, case.config), names


def merged(parts):
    """Tensors of all ranks by stored name; those that several have must be equal to the last bit."""
    found = {}
    for part in parts:
        for name, x in part.items():
            known = found.setdefault(stored_name(name), x)
            assert torch.equal(known, x), f"{name}: copies differ"
    return found
