"""Who this process is among all; the only reader of the environment."""

import os
import sys
from dataclasses import dataclass


@dataclass
class World:
    """Place of this process.

    Attributes:
        rank: among all processes.
        size: how many there are.
        local_rank: among those of this host.
    """

    rank: int
    size: int
    local_rank: int


def hear_hydra() -> None:
    """Have Hydra hand errors through instead of printing them its own way, and not see what is not for it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = [
        word for word in sys.argv[1:] if not word.startswith("--local_rank")
    ]  # DeepSpeed's launcher adds it


def world() -> World:
    """Read what torchrun set; a process started by nothing is alone."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
