"""Who takes part, and how each is found."""

from dataclasses import dataclass
from importlib import import_module

from benchmarks.contender import Contender, Precision
from benchmarks.shape import Shape

INSTALL = "pip install --no-deps -r benchmarks/peers.txt"
MODULES = {
    "ours": "benchmarks.ours",
    "transformers": "benchmarks.peer_transformers",
    "litgpt": "benchmarks.peer_litgpt",
    "torchtitan": "benchmarks.peer_torchtitan",
}
PURE = ":pure"


@dataclass(frozen=True)
class Entry:
    """One implementation in one precision; ``name`` is what ``--only`` calls it."""

    name: str
    module: str
    precision: Precision

    def build(self, shape: Shape) -> Contender:
        """Its model, drawn, and optimizer.

        Raises:
            SystemExit: it is not installed, or is another model.
        """
        try:
            module = import_module(self.module)
        except ModuleNotFoundError as error:
            raise SystemExit(f"{self.name}: {error}; {INSTALL}, or leave it out with --only") from error
        contender: Contender = module.build(shape, precision=self.precision)
        if contender.n_parameters != shape.n_parameters:
            raise SystemExit(f"{self.name}: {contender.n_parameters} parameters, not {shape.n_parameters}")
        return contender


def entries(dtype: str) -> list[Entry]:
    """All that take part in ``dtype``, fp32 or bf16, in the order in which they take turns."""
    if dtype == "fp32":
        return [Entry(name, module, Precision.fp32) for name, module in MODULES.items()]
    mixed = [Entry(name, module, Precision.mixed) for name, module in MODULES.items()]
    pure = [Entry(name + PURE, module, Precision.pure) for name, module in MODULES.items() if name != "ours"]
    return mixed + pure


def named(dtype: str, name: str) -> Entry:
    """The entry of that name."""
    return next(entry for entry in entries(dtype) if entry.name == name)
