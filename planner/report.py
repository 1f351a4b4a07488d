"""What a dry run found, as numbers."""

from dataclasses import dataclass

from parallel.config_fit import Sizes
from parallel.mesh import MeshError
from planner.config import HardwareConfig
from planner.wire import Line

GIB = 2**30


class DoesNotFit(MeshError):
    """A plan that needs more memory than there is, in one line."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters: this rank's, and of its gradients and optimizer state, at rest between updates.
        gradients: of parameters, when the backward is done.
        optimizer: state of the optimizer.
        buffers: counts and biases of routers.
        peak: most that was live at once on the device, in an update that is not the first.
        at_peak: what that was, by what it was for; adds up to ``peak``.
        phase: what went on then.
        offloaded: whether parameters, gradients and optimizer state are in the memory of the host between updates.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    peak: int
    at_peak: dict[str, int]
    phase: str
    offloaded: bool

    @property
    def activations(self) -> int:
        """At the peak, all but parameters, gradients, optimizer state and buffers."""
        return sum(size for label, size in self.at_peak.items() if label not in RESIDENT)


RESIDENT = ("parameters", "gradients", "optimizer state", "buffers")


@dataclass(frozen=True)
class Report:
    """One rank of a plan at its true size.

    Attributes:
        title: what was built and chosen, in words.
        sizes: of the axes.
        rank: whose share it is.
        tokens: of one micro-batch's rows on this rank, before any axis but dp cuts them: rows, tokens a row.
        micro_batches: of an update, on this rank.
        hardware: what it was tried against.
        memory: what it takes.
        collectives: what it sends in one update.
        seconds: that the dry run took.
        remarks: where it differs from a run.
    """

    title: str
    sizes: Sizes
    rank: int
    tokens: tuple[int, int]
    micro_batches: int
    hardware: HardwareConfig
    memory: Memory
    collectives: list[Line]
    seconds: float
    remarks: list[str]

    @property
    def needed(self) -> int:
        """Bytes of the device: the peak, and what is kept for all that is no tensor."""
        return self.memory.peak + round(self.hardware.reserve_gib * GIB)

    @property
    def available(self) -> int:
        """Bytes of the device."""
        return round(self.hardware.memory_gib * GIB)

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            DoesNotFit: says by how much.
        """
        if self.needed > self.available:
            raise DoesNotFit(
                f"hardware={self.hardware.name}: rank {self.rank} needs {self.needed / GIB:.1f} GiB, of which "
                f"{self.memory.activations / GIB:.1f} beside parameters, gradients and optimizer state, and has "
                f"{self.available / GIB:.1f}: {(self.needed - self.available) / GIB:.1f} GiB short"
            )

    def near(self, line: Line) -> bool:
        """Whether the ranks of a collective are all on one node."""
        return line.first // self.hardware.node_ranks == line.last // self.hardware.node_ranks

    def at_link_speed(self, line: Line) -> float:
        """Seconds that a collective's bytes take on the slowest link they cross, were nothing else on it."""
        speed = self.hardware.node_gb_s if self.near(line) else self.hardware.network_gb_s
        return line.sent / (speed * 1e9)
