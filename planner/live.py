"""How much memory tensors take, at every moment of a program that runs, and what it was for when it was most."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.wire import Wire

LABELS = {
    "attention": "attention",
    "mla": "attention",
    "deltanet": "attention",
    "mlp": "feed-forward",
    "moe": "experts",
    "head": "head and loss",
    "loss": "head and loss",
    "block": "residual stream",
    "mtp": "residual stream",
    "decoder": "residual stream",
    "pipeline": "between stages",
    "reduce": "update",
    "optim": "update",
    "adamw": "update",
    "optimizer": "update",
    "balance": "update",
}
"""What memory is for, by the file whose code asks for it; the innermost one that is listed counts."""

FSDP = "_fully_shard"  # torch's folder of it
GATHERED = "weights, gathered"
SUMMING = "gradients, before their sum over ranks"
BACKWARD = "backward"  # what autograd asks for without going through any of our files


@dataclass
class Storage:
    """Memory of one or several tensors.

    Attributes:
        size: in bytes, now.
        label: what it is for.
        born: how many had been met before it.
    """

    size: int
    label: str
    born: int
    reference: "weakref.ref[torch.UntypedStorage] | None" = None


@dataclass
class Peak:
    """The moment when most was live.

    Attributes:
        total: bytes.
        by: what they were for.
        clock: how many storages had been met by then.
        phase: what was going on.
    """

    total: int = 0
    by: Counter[str] = field(default_factory=Counter)
    clock: int = 0
    phase: str = ""


class Live(TorchDispatchMode):
    """Sees every result of torch on one kind of device, in a ``with``; works with fake tensors and with real ones.

    What an operator takes for itself and gives back before it ends is not seen.
    """

    def __init__(self, kind: str, *, wire: Wire | None = None) -> None:
        """Look at tensors on ``kind``, and tell ``wire`` of what is called: one that looks is faster than two."""
        super().__init__()
        self.kind, self.wire = kind, wire
        self.phase = ""
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak()
        self.paused = False
        self._clock = 0
        self._known: dict[int, Storage] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Live":
        original, live = self._resize, self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            live._changed(storage)
            return result

        # FSDP2 empties and fills the storages of gathered weights in this way, which is no operator.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and meet what it gives."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it becomes on the local tensors comes here again
        if self.wire is not None:
            self.wire.note(function, args)
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self.meet(each)
        return result

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Meet nothing: what is computed is a question about shapes."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def meet(self, x: Tensor, *, label: str | None = None) -> None:
        """Count the memory of a tensor from now on until it is freed, if it was not met before."""
        if x.device.type != self.kind:
            return
        storage = _local(x).untyped_storage()
        if storage._cdata not in self._known:
            self._add(storage, label or _origin())

    def leave_out(self, x: Tensor) -> None:
        """Count nothing for the memory of a tensor, which is elsewhere."""
        self._add(_local(x).untyped_storage(), "", counted=False)

    def sizes(self, tensors: Iterable[Tensor], *, until: int | None = None) -> Counter[str]:
        """Bytes by label of the storages of some tensors, each once; of those alone that were born ``until`` then."""
        found = {id(known): known for x in tensors if (known := self._known.get(_local(x).untyped_storage()._cdata))}
        counted: Counter[str] = Counter()
        for each in found.values():
            if until is None or each.born <= until:
                counted[each.label] += each.size
        return counted

    def _add(self, storage: torch.UntypedStorage, label: str, *, counted: bool = True) -> None:
        key = storage._cdata
        self._clock += 1
        known = Storage(storage.nbytes() if counted else 0, label, self._clock)
        known.reference = weakref.ref(storage, self._forgetting(key))
        self._known[key] = known
        self._grow(label, known.size)

    def _forgetting(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            known = self._known.pop(key)
            self._grow(known.label, -known.size)

        return forget

    def _changed(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(storage._cdata)
        if known is not None:
            before, known.size = known.size, storage.nbytes()
            self._grow(known.label, known.size - before)

    def _grow(self, label: str, size: int) -> None:
        self.now[label] += size
        self.total += size
        if self.total > self.peak.total:
            self.peak = Peak(self.total, self.now.copy(), self._clock, self.phase)


def _local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x


def _origin() -> str:
    """What the code that asks for memory is part of."""
    frame = sys._getframe(2)
    while frame is not None:
        label = _label(frame.f_code)
        if label is not None:
            return label
        frame = frame.f_back  # type: ignore[assignment]
    return BACKWARD


@cache
def _label(code: CodeType) -> str | None:
    if FSDP in code.co_filename:
        return SUMMING if "grad" in code.co_name or "reduce" in code.co_name else GATHERED
    return LABELS.get(PurePath(code.co_filename).stem)
