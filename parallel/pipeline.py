"""Pipeline parallelism: ranks of the axis pp have some layers each, and micro-batches go through one after another.

torch.distributed.pipelining runs the schedules (``parallel/schedule.py``). Stages are Decoders that lack some parts.
All shapes are known beforehand, so that no forward runs only to find them. What training needs beside states
(positions, documents, targets) every rank of pp has: they read the same rows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.comm import Lane, swapped
from parallel.config import PipelineConfig
from parallel.config_fit import stages_a_rank
from parallel.layout import COPY, Placed
from parallel.mesh import MeshError
from parallel.partition import rank_of
from parallel.reduce import local
from parallel.schedule import SPLIT, Ordered, orders
from parallel.stage import Stage, whole_backward
from zoo.block import Block
from zoo.config import ModelConfig
from zoo.decoder import Decoder, Objective
from zoo.mtp import MTP
from zoo.router import Router

SHARED = "embed.weight"
"""What two stages may have: the first looks tokens up in it; the last does for multi-token modules, or a tied head."""


class Pipeline(Placed):
    """This rank's stages of a model, which to a trainer look like the model.

    Parameters have the names that they have in the whole model. The embedding may be in two stages; the last stage's is
    a copy: its gradient is added to the first one's, it does not count in norms and is not stored. Where both are on
    this rank, ``@copy`` ends its name.

    Attributes:
        config: of the whole model.
        stages: this rank's, the first one first.
        numbers: of them among all.
    """

    def __init__(
        self,
        config: ModelConfig,
        stages: Mapping[int, Decoder],
        *,
        plan: PipelineConfig,
        lane: Lane,
        device: torch.device,
        recomputes: bool = False,
    ) -> None:
        """Take what ``partition.stages_of`` has given this rank.

        Args:
            config: of the whole model.
            stages: Decoders with their parts, by their number.
            plan: which schedule runs them.
            lane: the ranks of pp.
            device: where they compute.
            recomputes: whether blocks run again in the backward. A backward in two parts would run a block again for
                each group of its weights, so that then the part for the input is all of it.
        """
        super().__init__()
        self.config, self.plan, self.lane, self.device = config, plan, lane, device
        self.numbers = list(stages)
        self.stages = nn.ModuleList(stages.values())
        self.n_stages = lane.size * stages_a_rank(plan)
        self.recomputes = recomputes
        self.shares_embed = config.tied or config.n_mtp > 0
        ends = [stage for stage in stages.values() if stage.part.ends] if self.shares_embed else []
        here = any(stage.part.begins for stage in stages.values())
        self.copies = frozenset([SHARED + COPY if here else SHARED] if ends else [])
        self._schedules: dict[tuple[int, ...], tuple[Ordered, list[Stage]]] = {}
        self._weigh: Callable[[Tensor], Tensor] = torch.sum
        self._losses: list[Tensor] = []

    def parts(self) -> list[Decoder]:
        """This rank's stages, the first one first."""
        return [cast(Decoder, stage) for stage in self.stages]

    # What a trainer asks of a Decoder.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank by their names in the whole model; a second embedding is ``embed.weight@copy``."""
        seen = set()
        for stage in self.parts():
            for name, parameter in stage.named_parameters(recurse=recurse, remove_duplicate=remove_duplicate):
                yield f"{prefix}{'.' if prefix else ''}{name}{COPY if name in seen else ''}", parameter
                seen.add(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Parameters and buffers that are stored, by their names in the whole model: no copies."""
        found: dict[str, Any] = {}
        for stage in self.parts():
            mine = stage.state_dict(*args, **kwargs)
            found |= {name: x for name, x in mine.items() if name not in found and name not in self.copies}
        return found

    def layers(self) -> list[Block]:
        """This rank's blocks in order."""
        return [block for stage in self.parts() for block in stage.layers()]

    def depths(self) -> list[MTP]:
        """Modules of multi-token prediction in order, where the last stage is."""
        return [mtp for stage in self.parts() for mtp in stage.depths()]

    def routers(self) -> dict[str, Router]:
        """This rank's routers by their names in the whole model."""
        return {name: router for stage in self.parts() for name, router in stage.routers().items()}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations."""
        dtype = self.parts()[0].compute_dtype
        assert dtype is not None, "stages are given it"
        return dtype

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """As a Decoder, without gradients: states from stage to stage, the result to all (sends, a broadcast over pp).

        What layers communicate besides. Every rank of pp gives the same tokens.
        """
        length = tokens.shape[1]
        tokens, positions, documents = self.parts()[0].fitted(tokens, positions, documents)
        x = self.through(tokens, positions=positions, documents=documents, objective=objective)
        last = self._rank(self.n_stages - 1)
        x = x.contiguous() if self.lane.rank == last else self._empty(tokens, objective)
        dist.broadcast(x, group=self.lane.group, group_src=last)
        return x[:, :length] if objective is None else x

    @torch.no_grad()
    def through(
        self, tokens: Tensor, *, positions: Tensor, documents: Tensor | None, objective: Objective | None
    ) -> Tensor:
        """As ``forward`` of fitted rows, on the rank of the last stage; no other waits for it (sends over pp)."""
        shape, x = self.parts()[0].states(*tokens.shape), tokens
        for number, stage in zip(self.numbers, self.parts(), strict=True):
            if number and self._rank(number - 1) != self.lane.rank:
                x = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
                dist.recv(x, group=self.lane.group, group_src=self._rank(number - 1))
            x = stage(x, positions=positions, documents=documents, objective=objective)
            if number + 1 < self.n_stages and self._rank(number + 1) != self.lane.rank:
                dist.send(x.contiguous(), group=self.lane.group, group_dst=self._rank(number + 1))
        return x

    def _empty(self, tokens: Tensor, objective: Objective | None) -> Tensor:
        """Memory for what the last stage gives: logits or losses."""
        if objective is None:
            shape, dtype = (*tokens.shape, self.config.vocab_size), self.compute_dtype
        else:
            shape, dtype = (1 + objective.mtp_tokens.shape[1],), torch.promote_types(self.compute_dtype, torch.float32)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _rank(self, number: int) -> int:
        return rank_of(number, self.plan.schedule, pp=self.lane.size)

    # Training.

    def run(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        documents: Tensor,
        objective: Objective,
        n: int,
        weigh: Callable[[Tensor], Tensor],
        last: bool,
    ) -> Tensor:
        """Add the gradients of ``n`` micro-batches (states and their gradients over pp; what layers and FSDP send).

        Args:
            tokens: (n·B, T), micro-batches one after another; all else likewise. Every rank of pp gives the same.
            positions: (n·B, T).
            documents: (n·B, T).
            objective: of all of them.
            n: how many.
            weigh: makes the scalar to differentiate of the (1 + depths,) losses of one micro-batch.
            last: whether these are the last of an update: only then FSDP sums gradients over its ranks.

        Returns:
            (1 + depths,) losses, summed over micro-batches; zeros where the last stage is not.
        """
        assert len(tokens) % n == 0, f"{tokens.shape=} {n=}"
        schedule, stages = self._schedule(n, tokens, depths=objective.mtp_tokens.shape[1])
        for stage in stages:
            stage.asked, stage.reduces = objective, last
        self._weigh, self._losses = weigh, []
        try:
            schedule.step(
                *([tokens] if self.numbers[0] == 0 else []),
                target=objective.targets,
                return_outputs=False,
                positions=positions,
                documents=documents,
                targets=objective.targets,
                mtp_tokens=objective.mtp_tokens,
                mtp_targets=objective.mtp_targets,
            )
        except RuntimeError as error:  # in which torch wraps what a forward raises
            if isinstance(error.__cause__, MeshError):
                raise error.__cause__ from None
            raise
        zeros = torch.zeros_like(self._empty(tokens, objective))
        return torch.stack(self._losses).sum(dim=0) if self._losses else zeros

    def _loss(self, losses: Tensor, _: Tensor) -> Tensor:
        """For torch: the scalar of one micro-batch."""
        self._losses.append(losses.detach())
        return self._weigh(losses)

    def _schedule(self, n: int, tokens: Tensor, *, depths: int) -> tuple[Ordered, list[Stage]]:
        """The schedule for micro-batches of this number and shape, made when they first come."""
        key = (n, *tokens.shape, depths)
        if key not in self._schedules:
            stages = [
                self._stage(number, rows=len(tokens) // n, length=tokens.shape[1], depths=depths)
                for number in self.numbers
            ]
            order = orders(self.plan.schedule, pp=self.lane.size, virtual=self.plan.virtual, n=n)
            self._schedules[key] = Ordered([*stages], order, n=n, loss=self._loss), stages
        return self._schedules[key]

    def _stage(self, number: int, *, rows: int, length: int, depths: int) -> Stage:
        """One of this rank's stages for micro-batches of a shape."""
        decoder = self.parts()[self.numbers.index(number)]
        split = self.plan.schedule in SPLIT
        if split and isinstance(decoder, FSDPModule):
            # The part of the backward for weights finds them as the forward left them.
            decoder.set_reshard_after_forward(False)
        states = torch.empty(decoder.states(rows, length), dtype=self.compute_dtype, device="meta", requires_grad=True)
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        losses = torch.empty(
            1 + depths, dtype=torch.promote_types(self.compute_dtype, torch.float32), device="meta", requires_grad=True
        )
        return Stage(
            decoder,
            number,
            self.n_stages,
            self.device,
            input_args=tokens if decoder.part.begins else states,
            output_args=losses if decoder.part.ends else states,
            group=self.lane.group,
            dw_builder=whole_backward if split and (self.recomputes or decoder.depths()) else None,
        )

    # What two stages have.

    def sum_copies(self) -> None:
        """Add up the gradients of the embedding that two stages have (an exchange over pp); both get the same sum."""
        both = self.twins().values()
        for parameter in both:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in both if parameter.grad is not None]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:  # a + b is b + a, bitwise
            gradients[0].add_(self._exchanged(gradients[0]))

    @torch.no_grad()
    def match_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Make copies equal to what they are copies of, after a checkpoint was read (one send over pp).

        Args:
            tensors: parameters, or moments of them, by the names of parameters.
        """
        mine = [local(tensors[name]) for name in self.twins()]
        if len(mine) == 2:
            mine[1].copy_(mine[0])
        elif mine:
            theirs = self._exchanged(mine[0])
            if self.copies:
                mine[0].copy_(theirs)

    def twins(self) -> dict[str, nn.Parameter]:
        """This rank's embeddings that another stage has too, the first stage's first."""
        return {n: p for n, p in self.named_parameters() if self.shares_embed and n in (SHARED, SHARED + COPY)}

    def _exchanged(self, x: Tensor) -> Tensor:
        """What the other of the first and the last stage has (a send each way over pp)."""
        peer = self._rank(0) if self.copies else self._rank(self.n_stages - 1)
        return swapped(x, self.lane, peer=peer, device=self.device)
