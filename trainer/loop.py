"""One update after another."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import Tensor

from parallel.config_fit import accumulation
from parallel.mesh import Mesh
from trainer import balance, experts, optim, positions
from trainer.attention_logits import by_layer, largest
from trainer.checkpoint import Checkpoints
from trainer.config import OptimConfig, TrainConfig
from trainer.config_schedule import ScheduleConfig
from trainer.engine import Attention, Terms, TorchEngine, count
from trainer.evaluate import evaluate
from trainer.identity import plain
from trainer.log import Log
from trainer.metrics import Metrics, to_lists
from trainer.sample import Sampler
from trainer.schedule import Moment, Schedule
from trainer.state import State
from trainer.stream import Batch, Streams
from trainer.watch import Watch


@dataclass(frozen=True)
class Recipe:
    """How updates are made, by ``dp`` ranks that see different rows."""

    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    dp: int

    def accumulation(self, rows: int) -> int:
        """Micro-batches that a rank adds up for an update of so many rows."""
        return accumulation(global_batch=rows, micro_batch=self.train.micro_batch, dp=self.dp)


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go: a line an update, what is shown, whole states, text at evaluations (or None), looks."""

    metrics: Metrics
    log: Log
    checkpoints: Checkpoints
    sampler: Sampler | None
    watch: Watch


class Trainer:
    """Holds what changes during a run; ``fit`` reads top to bottom."""

    def __init__(
        self, engine: TorchEngine, *, mesh: Mesh, state: State, streams: Streams, recipe: Recipe, outputs: Outputs
    ) -> None:
        self.engine = engine
        self.mesh = mesh
        self.state = state
        self.streams = streams
        self.recipe = recipe
        self.outputs = outputs
        self.schedule = Schedule.of(recipe.schedule, train=recipe.train)
        self.layers = balance.layers(engine.model.config)
        self.phases = positions.phases(engine.model.config, recipe.schedule.theta)

    def fit(self) -> None:
        """Train until all updates are done (all axes)."""
        out, config = self.outputs, self.recipe.train
        out.log.say(optim.table(self.engine.model.config, self.recipe.optim))
        stream = iter(self.streams.train)
        if self.state.step:
            out.log.say(f"goes on after update {self.state.step}")
        while self.state.step < config.steps:
            out.metrics.start(tokens=self.state.tokens)
            with out.watch.update(say=out.log.say):
                self.step(stream)
            if config.eval_every and self._due(config.eval_every):
                self._evaluate()
            out.log.row(out.metrics.write())
            if self._due(out.checkpoints.config.every):
                self._save()
        out.metrics.close()

    def step(self, stream: Iterator[Batch]) -> None:
        """One update (counts, losses and loads over dp, gradients by the engine, norm and logits over the mesh)."""
        watch, now = self.outputs.watch, self.schedule.at(self.state.step)
        self._set(now)
        batches = [next(stream) for _ in range(self.recipe.accumulation(now.rows))]
        counts = count(batches, self.mesh)
        terms = self.engine.forward_backward(batches, counts)
        lr = self.recipe.optim.lr * now.lr
        optim.set_lr(self.engine.optimizer, lr)
        squares = self.engine.squares()
        with watch.changing():
            if admitted := watch.admits(loss=terms.losses[0], squares=squares):
                self.engine.update(max_norm=self.recipe.train.max_norm, squares=squares)
            else:
                self.engine.forget()
        attention = self.engine.attention(admitted=admitted)
        loads = balance.update(self.engine.model, self.mesh, scale=now.balance_rate if admitted else 0.0)
        self.state.advance(tokens=now.rows * self.recipe.train.seq_len, skipped=not admitted)
        self._record(terms, squares=squares, attention=attention, loads=loads, lr=lr)

    def _set(self, now: Moment) -> None:
        """What changes now and then: the weight of MTP losses, rotary angles."""
        mtp_weight = self.recipe.train.mtp_weight * now.mtp_weight
        if mtp_weight != self.engine.mtp_weight:
            self.engine.weigh(mtp_weight=mtp_weight)
        if self.phases[now.theta] is not self.engine.model.config:
            positions.turn(self.engine.model, self.phases[now.theta])
            theta = self.recipe.schedule.theta[now.theta - 1].theta
            self.outputs.log.say(f"rotary theta is {theta:,.10g} from update {self.state.step + 1} on")

    def _record(
        self, terms: Terms, *, squares: Tensor, attention: Attention | None, loads: Tensor | None, lr: float
    ) -> None:
        tensors = {"loss": terms.losses[0], "grad_norm": squares.sum().sqrt()}
        if len(terms.losses) > 1:
            tensors["mtp_loss"] = terms.losses[1:].mean()
        if len(terms.losses) > 2:
            tensors |= {f"mtp_loss/{depth}": loss for depth, loss in enumerate(terms.losses[1:], start=1)}
        if self.recipe.train.z_loss:
            tensors["z_loss"] = terms.z
        out, done, every = self.outputs, self.state, self.outputs.log.config.experts
        recorded = loads is not None and every > 0 and done.step % every == 0
        if loads is not None:
            tensors |= {"balance_loss": terms.balance} | experts.summary(loads)
            if balance.z_losses(self.engine.model.config):
                tensors["router_z_loss"] = terms.router_z
            if recorded:
                tensors |= experts.by_layer(loads, self.layers)
        if attention is not None:
            tensors["max_attention_logit"] = largest(attention.logits)
            if attention.clipped is not None:
                tensors["clipped_heads"] = attention.clipped
            if out.watch.details:
                tensors |= by_layer(attention.logits)
        numbers = out.watch.read(tensors, squares=squares, say=out.log.say)
        out.metrics.add(step=done.step, tokens=done.tokens, tensors={}, numbers=numbers | {"lr": lr})
        if loads is not None and recorded:
            of = dict(zip(self.layers, to_lists(loads), strict=True))
            out.metrics.add_loads(done.step, of)
            out.log.loads(done.step, of)

    def _evaluate(self) -> None:
        loss = evaluate(self.engine, self.streams.validation, self.mesh)
        self.outputs.metrics.merge({"val_loss": loss})
        if self.outputs.sampler is not None:
            self.outputs.sampler.write(self.engine.model, step=self.state.step)

    def _save(self) -> None:
        progress = {
            "state": asdict(self.state),
            "stream": self.streams.train.state_dict(),
            "model": plain(self.engine.model.config),
        }
        self.outputs.metrics.sync()
        self.outputs.checkpoints.save(self.state.step, self.engine.state(), progress=progress)

    def _due(self, every: int) -> bool:
        """Every so many updates (0: never), and after the last."""
        return self.state.step == self.recipe.train.steps or (every > 0 and self.state.step % every == 0)
