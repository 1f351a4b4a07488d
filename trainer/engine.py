"""What a step needs of an engine: gradients of a global batch, an update, and the state to store. The torch engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallel import reduce
from parallel.config_fit import microbatches
from parallel.fsdp import sync_gradients
from parallel.layout import Placed
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from trainer import balance, optim
from trainer.attention_logits import Meter, attending
from trainer.config import OptimConfig, TrainConfig
from trainer.loss import Vocabulary, ZLoss, cross_entropy
from trainer.qk_clip import QKClip
from trainer.stream import Batch
from zoo.decoder import Decoder, Objective


@dataclass
class Counts:
    """What divides the losses of one update, over all ranks.

    Attributes:
        targets: (1 + n_mtp,), predictions to make: main, then each depth.
        rows: scalar, rows of the global batch.
    """

    targets: Tensor
    rows: Tensor


@dataclass
class Terms:
    """Losses of one update, means over the global batch, the same on every rank.

    Attributes:
        losses: (1 + n_mtp,), nats a target: main, then each depth.
        balance: scalar, the sum of all layers' balance losses.
        router_z: scalar, the sum of all routers' z-losses.
        z: scalar, the z-loss of the logits, with its weight.
    """

    losses: Tensor
    balance: Tensor
    router_z: Tensor
    z: Tensor


@dataclass
class Attention:
    """Attention logits of one update, the same on every rank.

    Attributes:
        logits: (H,), the largest of each head, by layer.
        clipped: heads that QK-Clip scaled, above its tau; None without it.
    """

    logits: dict[str, Tensor]
    clipped: Tensor | None


class TorchEngine:
    """Plain torch, with FSDP2 where the model was spread by it, and torch's schedules where stages share it."""

    def __init__(self, model: Decoder | Pipeline, *, mesh: Mesh, train: TrainConfig, optim_config: OptimConfig) -> None:
        self.model = model
        self.mesh = mesh
        self.optimizer = optim.build(model, optim_config, mesh=mesh)
        self.clip = None if optim_config.qk_clip is None else QKClip(model, optim_config.qk_clip)
        self.meter = None if self.clip is None else Meter(model, mesh)
        lane, vocabulary = mesh.lane("tp"), None
        if lane is not None:
            assert isinstance(model, Placed), f"{type(model)=}"
            vocabulary = Vocabulary(lane, model.places["embed.weight"].tp.part.start)
        self.shapes = optim.shapes(model.config)
        self.z_loss = ZLoss(train.z_loss, torch.zeros((), dtype=torch.float64, device=mesh.device))
        self.mtp_loss = partial(cross_entropy, chunk=train.loss_chunk, vocabulary=vocabulary)
        self.loss = partial(self.mtp_loss, z_loss=self.z_loss) if train.z_loss else self.mtp_loss
        self.weigh(mtp_weight=train.mtp_weight)

    def weigh(self, *, mtp_weight: float) -> None:
        """Set what multiplies the mean of the MTP losses from now on."""
        self.mtp_weight = mtp_weight
        depths = self.model.config.n_mtp
        each = [mtp_weight / depths] * depths if depths else []
        self.weights = torch.tensor([1.0, *each], dtype=torch.float64, device=self.mesh.device)

    def forward_backward(self, batches: Sequence[Batch], counts: Counts) -> Terms:
        """Add the gradients of every micro-batch (parameters over fsdp, gradients and losses over all axes).

        Layers that are shared communicate activations besides: over tp, cp, ep and, from stage to stage, pp.
        """
        divisors = counts.targets.clamp(min=1)
        if balance.counts_ahead(self.model.config):
            self._count_ahead(batches)
        self.z_loss.total.zero_()
        if isinstance(self.model, Pipeline):
            total = self._through_stages(self.model, batches, counts)
        else:
            total = torch.zeros_like(counts.targets)
            for i, batch in enumerate(batches):
                sync_gradients(self.model, now=i == len(batches) - 1)
                losses = self.losses(batch, rows=counts.rows, depths=self.model.config.n_mtp) / divisors
                (losses * self.weights).sum().backward()
                total += losses.detach()
        reduce.complete(self.model)
        of_routers = balance.losses(self.model, self.mesh)
        of_logits = self.z_loss.total[None] / divisors[0]
        reduced = reduce.total(torch.cat([total, of_routers, of_logits]), self.mesh, axis="losses")
        return Terms(reduced[:-3], *reduced[-3:])

    @torch.no_grad()
    def _count_ahead(self, batches: Sequence[Batch]) -> None:
        """Let routers choose for the whole global batch before any gradient (as forwards; a sum of loads over all)."""
        forward = self.model.through if isinstance(self.model, Pipeline) else self.model
        for batch in batches:
            batch = batch.to(self.mesh.device)
            objective = Objective(batch.targets, batch.mtp_tokens, batch.mtp_targets, None, nothing)
            forward(batch.tokens, positions=batch.positions, documents=batch.documents, objective=objective)
        balance.ahead(self.model, self.mesh)

    def _through_stages(self, model: Pipeline, batches: Sequence[Batch], counts: Counts) -> Tensor:
        """Losses of all micro-batches, each a mean over the global batch, and their gradients (all but reductions)."""
        divisors = counts.targets.clamp(min=1)
        n = microbatches(model.plan, accumulation=len(batches))
        total = torch.zeros_like(counts.targets)
        for first in range(0, len(batches), n):
            some = [batch.to(self.mesh.device) for batch in batches[first : first + n]]
            objective = Objective(
                targets=torch.cat([batch.targets for batch in some]),
                mtp_tokens=torch.cat([batch.mtp_tokens for batch in some]),
                mtp_targets=torch.cat([batch.mtp_targets for batch in some]),
                rows=counts.rows,
                loss=self.loss,
                mtp_loss=self.mtp_loss,
            )
            losses = model.run(
                torch.cat([batch.tokens for batch in some]),
                positions=torch.cat([batch.positions for batch in some]),
                documents=torch.cat([batch.documents for batch in some]),
                objective=objective,
                n=n,
                weigh=lambda losses: (losses / divisors * self.weights).sum(),
                last=first + n == len(batches),
            )
            total += losses / divisors
        return total

    def losses(self, batch: Batch, *, rows: Tensor | None, depths: int) -> Tensor:
        """(1 + depths,) summed losses of one micro-batch of this rank (parameters over dp_shard)."""
        batch = batch.to(self.mesh.device)
        mtp_tokens, mtp_targets = batch.mtp_tokens[:, :depths], batch.mtp_targets[:, :depths]
        objective = Objective(batch.targets, mtp_tokens, mtp_targets, rows, self.loss, self.mtp_loss)
        return self.model(batch.tokens, positions=batch.positions, documents=batch.documents, objective=objective)

    def filled(self) -> None:
        """After values were read or drawn: stages that have a copy of something make it equal (a send over pp)."""
        if not isinstance(self.model, Pipeline):
            return
        parameters = dict(self.model.named_parameters())
        moments = optim.state(self.model, self.optimizer)
        self.model.match_copies(parameters)
        alike = {name: state for name, state in moments.items() if name in self.model.twins()}
        for key in sorted({key for state in alike.values() for key in state}):
            self.model.match_copies({name: state[key] for name, state in alike.items()})

    def squares(self) -> Tensor:
        """(parameters,) squared gradient norms, in the order of ``shapes`` (one all-reduce over pp, fsdp and tp)."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return reduce.squares(self.model, self.mesh, gradients, names=list(self.shapes))

    def update(self, *, max_norm: float, squares: Tensor | None = None) -> Tensor:
        """Clip, step, forget the gradients; the gradient norm before clipping (norm over all axes of a copy).

        Args:
            max_norm: to which gradients are clipped.
            squares: what ``squares`` has given; None: it is asked.
        """
        norm = (self.squares() if squares is None else squares).sum().sqrt()
        reduce.clip(reduce.gradients(self.model), norm=norm, max_norm=max_norm)
        self.optimizer.step()
        self.forget()
        return norm

    def forget(self) -> None:
        """Let go of the gradients; parameters, moments and counts of steps stay as they are."""
        self.optimizer.zero_grad()

    def measure(self) -> None:
        """Measure attention logits from now on, which QK-Clip does anyway."""
        if self.meter is None and attending(self.model.config):
            self.meter = Meter(self.model, self.mesh)

    def attention(self, *, admitted: bool = True) -> Attention | None:
        """Largest attention logits of an update, where measured, and QK-Clip by them (MAX over all axes).

        Args:
            admitted: whether the update was made; else weights stay as they are.
        """
        if self.meter is None:
            return None
        logits = self.meter.read()
        if self.clip is None or not admitted:
            return Attention(logits, None if self.clip is None else torch.zeros_like(next(iter(logits.values()))[0]))
        return Attention(logits, self.clip.update(logits))

    def state(self) -> dict[str, object]:
        """The live tensors that a checkpoint holds and is read into."""
        model = self.model.state_dict()  # first: it shards anew what FSDP2 has left whole after an evaluation
        moments = optim.state(self.model, self.optimizer).items()
        copies = self.model.copies if isinstance(self.model, Placed) else frozenset()
        return {
            "model": reduce.views(self.model, model),
            "optimizer": {
                name: {key: reduce.view(self.model, name, x) for key, x in state.items()}
                for name, state in moments
                if name not in copies
            },
        }


def nothing(h: Tensor, weight: Tensor, targets: Tensor, /, *, softcap: float | None) -> Tensor:
    """The loss of a forward that is made for what it counts."""
    return torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)


def count(batches: Sequence[Batch], mesh: Mesh) -> Counts:
    """Count targets and rows of the global batch (one all-reduce over dp)."""
    wide = torch.float64  # exact to 2^53 targets
    main = sum(int((batch.targets >= 0).sum()) for batch in batches)
    depths = sum((batch.mtp_targets >= 0).sum(dim=(0, 2)) for batch in batches)
    rows = sum(batch.tokens.shape[0] for batch in batches)
    assert isinstance(depths, Tensor), f"{len(batches)=}"
    numbers = torch.tensor([main, *depths.tolist(), rows], dtype=wide, device=mesh.device)
    reduced = reduce.total(numbers, mesh)
    return Counts(reduced[:-1], reduced[-1])
