"""How one stored tensor of a Hugging Face folder is made of ours, and each of ours found in it again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One stored tensor.

    Its rows (or columns, experts' rows, …: dimension ``dim`` of ours) come in ``groups``, in each of which every part
    has its share. Example with parts a (rows a0 a1) and b (b0 b1): one group is a0 a1 b0 b1, two are a0 b0 a1 b1.

    Attributes:
        key: it is stored under.
        shape: it is stored in.
        parts: our names and shapes of what it holds, in order.
        dim: of ours along which parts lie beside each other.
        groups: how often parts take turns.
        transposed: whether the last two dimensions are exchanged.
        row: of the one part, a bank, the expert it holds alone; None: all of it.
    """

    key: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[int, ...]]
    dim: int = 0
    groups: int = 1
    transposed: bool = False
    row: int | None = None

    def assemble(self, get: Callable[[str], Tensor]) -> Tensor:
        """The stored tensor, of parts that are fetched one at a time; a whole one alone is handed on as it is."""
        names = list(self.parts)
        one = get(names[0])
        if self.row is not None:
            return one[self.row]
        if len(names) == 1 and not self.transposed:
            return one.reshape(self.shape)
        stored = one.new_empty(self.shape)
        self._share(stored, names[0]).copy_(self._turns(one))
        del one  # before the next is fetched
        for name in names[1:]:
            self._share(stored, name).copy_(self._turns(get(name)))
        return stored

    def extract(self, stored: Tensor, name: str) -> Tensor:
        """One part of the stored tensor, or of some experts of a stored bank, as a tensor of its own."""
        if self.row is not None:
            return stored
        shape = self.parts[name]
        if len(shape) == 3:
            shape = (len(stored), *shape[1:])
        if len(self.parts) == 1 and not self.transposed:
            return stored.reshape(shape)
        ours = stored.new_empty(shape)
        self._turns(ours).copy_(self._share(stored, name))
        return ours

    def _turns(self, ours: Tensor) -> Tensor:
        """Ours with its share of each group apart."""
        return ours.unflatten(self.dim, (self.groups, -1))

    def _share(self, stored: Tensor, name: str) -> Tensor:
        """View of the stored tensor that is one part's, in the shape of ``_turns``."""
        if self.transposed and stored.dim() > 1:
            stored = stored.transpose(-1, -2)
        ours = len(self.parts[name])
        if stored.dim() > ours:  # a dimension of one in the middle: channels of a convolution
            stored = stored.flatten(1, stored.dim() - ours + 1)
        sizes = [shape[self.dim] // self.groups for shape in self.parts.values()]
        before = sum(sizes[: list(self.parts).index(name)])
        size = self.parts[name][self.dim] // self.groups
        return stored.unflatten(self.dim, (self.groups, sum(sizes))).narrow(self.dim + 1, before, size)


def stacked(keys: list[str], name: str, shape: tuple[int, ...]) -> list[Layout]:
    """A bank of experts of which each is stored under a key of its own."""
    return [Layout(key, shape[1:], {name: shape}, row=e) for e, key in enumerate(keys)]


def fused(
    key: str,
    parts: Mapping[str, tuple[int, ...]],
    *,
    dim: int = 0,
    groups: int = 1,
    transposed: bool = False,
    unit: bool = False,
) -> Layout:
    """Parts that are stored as one; ``unit``: with a dimension of one after the first."""
    shape = list(next(iter(parts.values())))
    shape[dim] = sum(part[dim] for part in parts.values())
    if unit:
        shape.insert(1, 1)
    if transposed and len(shape) > 1:
        shape[-2:] = shape[:-3:-1]
    return Layout(key, tuple(shape), parts, dim=dim, groups=groups, transposed=transposed)
