"""What an update does inside: gradient norms, sizes of activations and of changes, by group and layer, of all ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel import reduce
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from trainer import groups
from trainer.spikes import layer
from zoo.block import Block
from zoo.decoder import Decoder


class Detail:
    """Measures an update where ``begin`` has been called before it.

    Groups are the roles of parameters (``trainer/groups.py``), such as matrix and norm; layers are blocks.3 and mtp.0.
    """

    def __init__(self, model: Decoder | Pipeline, mesh: Mesh, *, shapes: Mapping[str, Sequence[int]]) -> None:
        """Listen to the blocks of this rank.

        Args:
            model: to look into.
            mesh: over which it is spread.
            shapes: of all parameters of the whole model, by name.
        """
        self.model, self.mesh = model, mesh
        self.names = list(shapes)
        config = model.config
        self.layers = [*(f"blocks.{i}" for i in range(config.n_layers)), *(f"mtp.{k}" for k in range(config.n_mtp))]
        self._members: dict[str, Tensor] = {}
        for key in [*groups.Role, *self.layers]:
            here = [key in (groups.role(name, config=config), layer(name)) for name in shapes]
            if any(here):
                self._members[str(key)] = torch.tensor(here, device=mesh.device)
        self._numbers = torch.tensor([_numel(shape) for shape in shapes.values()], device=mesh.device)
        self.due = False
        self._seen = torch.zeros(2, len(self.layers), dtype=torch.float64, device=mesh.device)
        self._changes: Tensor | None = None
        for name, block in _blocks(model):
            block.register_forward_hook(self._listener(self.layers.index(name)))

    def begin(self) -> None:
        """Measure the update that comes."""
        self.due, self._changes = True, None
        self._seen.zero_()

    @contextmanager
    @torch.no_grad()
    def updating(self) -> Iterator[None]:
        """Around the optimizer's step, to see what it changes (one all-reduce over pp, fsdp and tp)."""
        if not self.due:
            yield
            return
        # A second copy of this rank's parameters, which is why details are asked for.
        before = {name: reduce.local(p.detach()).clone() for name, p in self.model.named_parameters()}
        yield
        after = {name: reduce.local(p.detach()) for name, p in self.model.named_parameters()}
        changes = {name: after[name] - before[name] for name in after}
        self._changes = reduce.squares(self.model, self.mesh, changes, names=self.names)

    @torch.no_grad()
    def read(self, squares: Tensor) -> dict[str, Tensor]:
        """Scalars by their keys in ``metrics.jsonl``, the same on every rank (all-reduces over pp, dp and cp, and tp).

        Args:
            squares: of the gradient norm of each parameter.
        """
        assert self.due and self._changes is not None
        self.due = False
        for axis in ("losses", "tp"):
            reduce.total(self._seen, self.mesh, axis=axis)
        found = {f"grad_norm/{key}": squares[mine].sum().sqrt() for key, mine in self._members.items()}
        for key, mine in self._members.items():
            found[f"update_rms/{key}"] = (self._changes[mine].sum() / self._numbers[mine].sum()).sqrt()
        sizes = (self._seen[0] / self._seen[1]).sqrt()
        return found | {f"activation_rms/{name}": sizes[i] for i, name in enumerate(self.layers)}

    def _listener(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        """What a block calls after its forward: adds up squares and how many, in training only."""

        def listen(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
            if self.due and torch.is_grad_enabled():  # evaluation and counts ahead of an update have no gradient
                x = output[0].detach()
                wide = torch.promote_types(x.dtype, torch.float32)
                self._seen[0, place] += torch.linalg.vector_norm(x, dtype=wide).square()
                self._seen[1, place] += x.numel()

        return listen


def _blocks(model: Decoder | Pipeline) -> Iterator[tuple[str, Block]]:
    """This rank's blocks by the names of their layers."""
    for stage in model.parts() if isinstance(model, Pipeline) else [model]:
        yield from zip((f"blocks.{number}" for number in stage.blocks), stage.layers(), strict=True)
        yield from ((f"mtp.{k}", mtp.block) for k, mtp in enumerate(stage.depths()))


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
