"""Muon: the momentum of every matrix, orthogonalised as a whole, is its update, however it is spread.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; scaled to AdamW's update RMS: Moonlight, arXiv
2502.16982, section 2.2. The arithmetic is that of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), bitwise on one
process. Momentum stays where the parameter's part is; ``parallel/exchange.py`` says what travels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.comm import Lane
from parallel.exchange import Round, Stack
from parallel.owners import Box, Matrix, boxes, tasks
from parallel.reduce import local
from trainer.config_muon import MuonConfig
from trainer.newton_schulz import orthogonal, working_dtype


@dataclass(frozen=True)
class Weight:
    """A parameter with the matrices in it.

    Attributes:
        parameter: as the model has it.
        view: the same as one tensor over all ranks that have this layer (``reduce.view``).
        matrices: in it.
    """

    parameter: nn.Parameter
    view: Tensor
    matrices: list[Matrix]


@dataclass(frozen=True)
class _Own:
    """Where on this rank a matrix has its piece.

    Attributes:
        parameter: that holds it.
        expert: which of the bank's on this rank; None where it is no bank.
        rows: of the rank's part, where they are not all.
    """

    parameter: nn.Parameter
    expert: int | None
    rows: Tensor | None

    def taken(self, x: Tensor) -> Tensor:
        """The piece, from this rank's part of a parameter, gradient or moment."""
        part = x if self.expert is None else x[self.expert]
        return part if self.rows is None else part[self.rows]

    def add(self, piece: Tensor, *, alpha: float) -> None:
        """Add a multiple of something to the piece of the parameter."""
        whole = local(self.parameter.detach())
        part = whole if self.expert is None else whole[self.expert]
        if self.rows is None:
            part.add_(piece, alpha=alpha)
        else:
            part[self.rows] = part[self.rows].add(piece, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Updates matrices; all ranks that share them step together."""

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        config: MuonConfig,
        lr: float,
        weight_decay: float,
        stage: Lane | None,
        copies: int,
        device: torch.device,
    ) -> None:
        """Plan who works on what; no communication.

        Args:
            weights: to update.
            config: numbers of the method.
            lr: learning rate.
            weight_decay: a step takes lr times this off.
            stage: the ranks that have parts of these weights; None: this one alone.
            copies: of all weights, by dp_replicate.
            device: that ranks communicate from.
        """
        super().__init__([each.parameter for each in weights], {"lr": lr, "weight_decay": weight_decay})
        self.config = config
        (dtype,) = {working_dtype(each.parameter.dtype) for each in weights}
        me, ranks = (0, 1) if stage is None else (stage.rank, stage.size)
        found: list[tuple[Matrix, list[Box]]] = []
        self._own: dict[Matrix, _Own] = {}
        for weight in weights:
            held = _boxes(weight.view, ranks=ranks)
            for matrix in weight.matrices:
                found.append((matrix, held))
                if matrix.piece(held[me]) is not None:
                    self._own[matrix] = _own(weight.parameter, matrix, held[me])
        self.rounds = [
            Round(some, lane=stage, dtype=dtype, device=device) for some in tasks(found, ranks=ranks, copies=copies)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update (two all-to-alls a round over dp_replicate, dp_shard, cp and tp)."""
        assert closure is None, "gradients are there"
        (group,) = self.param_groups
        c, lr = self.config, group["lr"]
        for parameter in group["params"]:
            if parameter.grad is None:  # nothing that was computed used it, on any rank
                parameter.grad = torch.zeros_like(parameter)
            start_momentum(self.state[parameter], parameter)
            momentum = local(self.state[parameter]["momentum_buffer"])
            momentum.lerp_(local(parameter.grad), 1 - c.momentum)
            local(parameter.detach()).mul_(1 - lr * group["weight_decay"])
        for each in self.rounds:
            stacks = [Stack(s.tasks, self._orthogonal(s.matrices)) for s in each.gather(self._part(each))]
            for number, piece in each.scatter(stacks).items():
                matrix = each.tasks[number].matrix
                own = self._own[matrix]
                scale = c.update_rms * math.sqrt(max(matrix.size))
                own.add(piece.to(own.parameter.device), alpha=-(lr * scale))

    def _part(self, of: Round) -> Callable[[int], Tensor]:
        """What gives this rank's piece of the direction of a task."""

        def part(number: int) -> Tensor:
            own = self._own[of.tasks[number].matrix]
            momentum = own.taken(local(self.state[own.parameter]["momentum_buffer"]))
            if not self.config.nesterov:
                return momentum
            assert own.parameter.grad is not None
            return own.taken(local(own.parameter.grad)).lerp(momentum, self.config.momentum)

        return part

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        return orthogonal(matrices, coefficients=self.config.coefficients, steps=self.config.ns_steps)


def start_momentum(state: dict[str, Tensor], parameter: nn.Parameter) -> None:
    """Make the momentum that the first update has yet to make, of zeros, spread as the parameter."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _boxes(view: Tensor, *, ranks: int) -> list[Box]:
    """What each of the ranks has of a tensor."""
    if not isinstance(view, DTensor):
        return boxes(view.shape, axes=(), placements=()) * ranks
    found = boxes(view.shape, axes=view.device_mesh.shape, placements=view.placements)
    assert len(found) == ranks, f"{view.device_mesh=} {ranks=}"
    return found


def _own(parameter: nn.Parameter, matrix: Matrix, box: Box) -> _Own:
    rows = matrix.rows(box)
    index = None if rows is None else torch.tensor(rows, device=parameter.device)
    return _Own(parameter, None if matrix.expert is None else matrix.expert - box[0][0], index)
