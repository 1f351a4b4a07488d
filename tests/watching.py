"""A trainer of a small model with all looks switched on, under any plan: ``from watching import watched``."""

import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from sharing import ADAMW, ALONE, ROWS, SETTINGS, Case, rows

from data.batch import Batch
from parallel import reduce
from trainer.config import CurveAxis, LogConfig, Wandb
from trainer.config_outliers import OutliersConfig
from trainer.config_schedule import ScheduleConfig, ScheduleKind
from trainer.engine import TorchEngine
from trainer.loop import Outputs, Recipe, Trainer
from trainer.metrics import Metrics
from trainer.state import State
from trainer.watch import Watch

RULE = OutliersConfig(sigma=6, window=12)
CALM = replace(ADAMW, lr=1e-4)
STEADY = ScheduleConfig(kind=ScheduleKind.linear, warmup=0, floor=1.0)
TIMES = ("seconds", "tokens_per_second")


def log_config(**more):
    return LogConfig(wandb=Wandb.disabled, project="zoo", every=1.0, curve=CurveAxis.linear, experts=0, **more)


class Watched:
    """A trainer without checkpoints or console.

    Attributes:
        said: lines for people.
        spoil: called with the update's number, from 1, and the model, when the gradients are there.
    """

    def __init__(self, name, plan, folder, *, log, train, spoil=None):
        self.case = case = Case(name, plan, optim_config=CALM)
        self.folder, self.said, self.state, self.spoil = folder, [], State(), spoil
        self.engine = TorchEngine(case.model, mesh=case.mesh, train=train, optim_config=CALM)
        forward_backward = self.engine.forward_backward

        def spoilt(batches, counts):
            terms = forward_backward(batches, counts)
            if self.spoil is not None:
                self.spoil(self.state.step + 1, case.model)
            return terms

        self.engine.forward_backward = spoilt
        watch = Watch(log, train=train, schedule=STEADY, engine=self.engine, state=self.state, folder=folder)
        self.metrics = Metrics(folder, rank=case.mesh.rank, step=0)
        self.outputs = Outputs(self.metrics, SimpleNamespace(say=self.said.append, config=log), None, None, watch)
        recipe = Recipe(train, CALM, STEADY, dp=case.mesh.sizes.dp)
        streams = SimpleNamespace(train=None, validation=[])
        self.trainer = Trainer(
            self.engine, mesh=case.mesh, state=self.state, streams=streams, recipe=recipe, outputs=self.outputs
        )
        self.stream = self._batches()

    def _batches(self):
        """This rank's rows of every update, one at a time."""
        share = ROWS // self.case.mesh.sizes.dp
        for step in range(1000):
            batch = rows(2 * step, self.case.config.n_mtp)  # an odd one lacks targets
            first = self.case.mesh.dp_rank * share
            for row in range(first, first + share):
                yield Batch(**{key: x[row : row + 1] for key, x in vars(batch).items()})

    def update(self):
        """One update; its line of metrics.jsonl."""
        self.metrics.start(tokens=self.state.tokens)
        with self.outputs.watch.update(say=self.said.append):
            self.trainer.step(self.stream)
        return {key: value for key, value in self.metrics.write().items() if key not in TIMES}


def scaled(parameter, *, at, by):
    """Spoils one update: the gradient of a parameter is multiplied."""

    def spoil(step, model):
        for name, p in model.named_parameters():
            if step == at and name == parameter and p.grad is not None:
                reduce.local(p.grad).mul_(by)

    return spoil


def watched(name, plan, folder, *, updates, parameter, at):
    """Updates of which one is spoilt: lines, what was said and reported, what was stored."""
    torch.set_num_threads(1)
    train = replace(SETTINGS, steps=100, z_loss=1e-2, outliers=RULE, skip=True)
    log = log_config(detail=True, detail_every=2, spikes=True)
    run = Watched(name, plan, folder, log=log, train=train, spoil=scaled(parameter, at=at, by=1e5))
    lines = [run.update() for _ in range(updates)]
    reports = [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]
    return lines, run.said, reports, run.state, run.case.tensors()


def alone(name, folder, **settings):
    return watched(name, ALONE, folder, **settings)
