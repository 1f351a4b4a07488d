"""How a model is trained: batches, optimizer, schedule, checkpoints, logging."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from trainer.config_check import check
from trainer.config_clip import QKClipConfig
from trainer.config_groups import Role
from trainer.config_muon import MuonConfig
from trainer.config_outliers import OutliersConfig


@dataclass
class TrainConfig:
    """One run's updates. Batches are in rows of ``seq_len`` tokens."""

    steps: int = MISSING
    global_batch: int = MISSING  # rows of one update, over all ranks; schedule.batch begins with fewer
    micro_batch: int = MISSING  # rows of one forward
    seq_len: int = MISSING
    max_norm: float = MISSING  # gradients are clipped to this norm
    mtp_weight: float = MISSING  # of the mean of the MTP losses; schedule.mtp_weight scales it
    loss_chunk: int = MISSING  # tokens that have logits at one time
    eval_every: int = MISSING  # updates between evaluations; 0: none
    eval_rows: int = MISSING  # rows of one evaluation, the same each time
    sample_tokens: int = MISSING  # tokens of the text sampled at an evaluation; 0: none
    sample_prompt: str = MISSING
    z_loss: float = 0.0  # weight of the mean of (log Z)², Z the sum of the exponentials of a target's logits
    outliers: OutliersConfig = field(default_factory=lambda: OutliersConfig(sigma=6, window=128))
    skip: bool = False  # outliers change nothing

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch", "micro_batch", "seq_len", "loss_chunk", "eval_rows", "max_norm"):
            check(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "above 0")
        for key in ("mtp_weight", "eval_every", "sample_tokens", "z_loss"):
            check(0 <= getattr(self, key) < math.inf, f"train.{key}", getattr(self, key), "0 or more, and finite")


class OptimKind(StrEnum):
    """Optimizers."""

    adamw = "adamw"
    muon = "muon"  # for matrices; AdamW for all else
    muonclip = "muonclip"  # muon, with QK-Clip after each update

    @property
    def is_muon(self) -> bool:
        """Whether matrices are orthogonalised."""
        return self is not OptimKind.adamw


class Moments(StrEnum):
    """How AdamW's two moments are stored."""

    full = "full"  # as wide as parameters
    bf16 = "bf16"  # rounded to the nearest after each update


BF16_STEP = 2**-8
"""Half the step between neighbours in bf16 is at most this share of them: what shrinks by less may stay as it is."""


@dataclass
class OptimConfig:
    """AdamW, arXiv 1711.05101, and Muon; QK-Clip goes with each."""

    kind: OptimKind = MISSING
    lr: float = MISSING  # peak
    weight_decay: float = MISSING
    beta1: float = MISSING
    beta2: float = MISSING
    eps: float = MISSING
    muon: MuonConfig | None = None
    moments: Moments = Moments.full  # of AdamW; Muon's momentum is as wide as parameters
    no_decay: list[Role] | None = None  # what weight_decay passes over; null: what has one dimension
    qk_clip: QKClipConfig | None = None

    def __post_init__(self) -> None:
        used, given = self.kind.is_muon, self.muon is not None
        check(used or not given, "optim.muon", "{…}", f"null where optim.kind={self.kind}")
        check(given or not used, "optim.muon", "null", f"given where optim.kind={self.kind}, as optim=muon does")
        self._check_clip()
        for key in ("lr", "eps"):
            check(0 < getattr(self, key) < math.inf, f"optim.{key}", getattr(self, key), "above 0, and finite")
        check(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more, and finite")
        for key in ("beta1", "beta2"):
            check(0 <= getattr(self, key) < 1, f"optim.{key}", getattr(self, key), "from 0 up to, not including, 1")
            shrinks = self.moments is Moments.full or getattr(self, key) <= 1 - BF16_STEP
            allowed = f"at most {1 - BF16_STEP} where optim.moments=bf16, whose rounding would undo a smaller decay"
            check(shrinks, f"optim.{key}", getattr(self, key), allowed)

    def _check_clip(self) -> None:
        """Whether the kind says that there is QK-Clip where there is, beside Muon."""
        clips = self.qk_clip is not None
        allowed = "null where optim.kind=muon; with it the kind is muonclip"
        check(self.kind is not OptimKind.muon or not clips, "optim.qk_clip", "{…}", allowed)
        check(self.kind is not OptimKind.muonclip or clips, "optim.qk_clip", "null", "given, as optim=muonclip does")


class EngineKind(StrEnum):
    """What runs the forward, backward and update."""

    torch = "torch"


@dataclass
class EngineConfig:
    """The engine."""

    kind: EngineKind = MISSING


@dataclass
class CheckpointConfig:
    """What of a run outlives a kill."""

    every: int = MISSING  # updates between checkpoints; 0: only after the last update
    keep: int = MISSING  # newest checkpoints that stay; 0: all
    resume: str = MISSING  # auto: the newest of run_dir, if any; never; or a folder step-…
    init: str | None = MISSING  # folder (step-… or Hugging Face) whose weights a fresh run starts from

    def __post_init__(self) -> None:
        check(self.every >= 0, "checkpoint.every", self.every, "0 or more")
        check(self.keep >= 0, "checkpoint.keep", self.keep, "0 or more")
        check(bool(self.resume), "checkpoint.resume", self.resume, "auto, never or a folder")
        allowed = f"null where checkpoint.resume is a folder ({self.resume})"
        check(self.init is None or self.resume in ("auto", "never"), "checkpoint.init", self.init, allowed)


class Wandb(StrEnum):
    """Where Weights & Biases keeps a run."""

    offline = "offline"  # in <run_dir>/wandb, without network; `wandb sync` uploads it later
    online = "online"  # falls back to offline, with a line saying so, where the server does not answer in a few seconds
    disabled = "disabled"


class CurveAxis(StrEnum):
    """How steps are spread along the loss curve."""

    linear = "linear"
    log = "log"


@dataclass
class LogConfig:
    """What a run shows while it goes."""

    wandb: Wandb = MISSING
    project: str = MISSING  # Weights & Biases project
    every: float = MISSING  # seconds between plain progress lines where the console is no terminal
    curve: CurveAxis = MISSING  # horizontal axis of plots/loss.png
    experts: int = MISSING  # updates between records of every expert's load; 0: none
    detail: bool = False  # gradient norms, update and activation sizes, by group and layer
    detail_every: int = 1  # updates between them
    profile: list[int] | None = None  # first and last update of a trace in <run_dir>/profile
    spikes: bool = False  # outliers of train.outliers are reported

    def __post_init__(self) -> None:
        check(self.experts >= 0, "log.experts", self.experts, "0 or more")
        check(self.every > 0, "log.every", self.every, "above 0")
        check(bool(self.project), "log.project", self.project, "not empty")
        check(self.detail_every >= 1, "log.detail_every", self.detail_every, "1 or more")
        p = self.profile
        pair = p is None or (len(p) == 2 and 1 <= p[0] <= p[1])
        check(pair, "log.profile", p, "null, or [first, last] update, from 1")
