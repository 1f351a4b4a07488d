"""The machines that a plan is tried against; values are in conf/hardware/."""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING


class DeviceKind(StrEnum):
    """Where models run."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass
class HardwareConfig:
    """One rank's device and what connects it. Speeds are peaks from data sheets, a direction where there are two."""

    name: str = MISSING
    kind: DeviceKind = MISSING
    memory_gib: float = MISSING  # that the driver reports, in GiB
    reserve_gib: float = MISSING  # of it for what is no tensor: the driver's context, buffers of NCCL, fragments
    bf16_tflops: float = MISSING  # dense matrix products
    fp32_tflops: float = MISSING  # without TF32
    memory_tb_s: float = MISSING
    node_ranks: int = MISSING  # neighbours that the fast links connect
    node_gb_s: float = MISSING  # of those links, out of one rank
    network_gb_s: float = MISSING  # to other nodes, out of one rank

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if key not in ("name", "kind", "reserve_gib") and value <= 0:
                raise ValueError(f"hardware.{key}={value}: must be above 0")
        if not 0 <= self.reserve_gib < self.memory_gib:
            raise ValueError(
                f"hardware.reserve_gib={self.reserve_gib}: must be 0 or more, and below hardware.memory_gib "
                f"({self.memory_gib})"
            )
