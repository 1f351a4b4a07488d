"""What works on each token alone, as data: feed-forward layers, routers, experts."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from zoo.config_check import check, check_above_0, check_weights


class Activation(StrEnum):
    """What stands between the matrices of a feed-forward layer; all but ``gelu`` have a gate."""

    swiglu = "swiglu"  # silu(gate) · up, arXiv 2002.05202
    geglu = "geglu"  # gelu(gate) · up, tanh form (Gemma 3, Grok 2.5)
    swiglu_clamped = "swiglu_clamped"  # both arms clamped, up + 1 (gpt-oss)
    gelu = "gelu"  # of one matrix, tanh form (GPT-2)


class Score(StrEnum):
    """How a router's logits become weights."""

    softmax = "softmax"  # over all experts
    softmax_chosen = "softmax_chosen"  # over the chosen ones (gpt-oss)
    sigmoid = "sigmoid"  # of each on its own (DeepSeek-V3, Kimi K2, GLM-4.5, Llama 4)


class GroupScore(StrEnum):
    """What a group of experts is worth to a token."""

    best = "best"  # its best expert's score (DeepSeek-V2)
    best_two = "best_two"  # the sum of its best two, biased (DeepSeek-V3)


class BatchScope(StrEnum):
    """Tokens over which a switch loss counts who was chosen; of V2's losses and V3's they are those of a row."""

    micro_batch = "micro_batch"  # train.micro_batch rows, those of one forward
    global_batch = "global_batch"  # all rows of an update: counted ahead of it (Qwen3)


@dataclass
class MLPConfig:
    """A feed-forward layer."""

    d_ff: int = MISSING
    activation: Activation = Activation.swiglu
    bias: bool = False  # of every matrix (GPT-2)

    def __post_init__(self) -> None:
        check_above_0(self, "mlp", "d_ff")


@dataclass
class SwitchLossConfig:
    """The loss of Switch Transformer, arXiv 2101.03961, section 2.2, for any number of chosen experts."""

    weight: float = 0.0  # what evenly busy experts cost
    scope: BatchScope = BatchScope.micro_batch

    def __post_init__(self) -> None:
        check_weights(self, "switch_loss", "weight")


@dataclass
class DeviceLossConfig:
    """DeepSeek-V2's three weights, arXiv 2405.04434, section 2.2.3; a router's groups are the paper's devices."""

    expert: float = 0.0  # alpha 1: experts of a row are equally busy
    device: float = 0.0  # alpha 2: devices compute as much
    communication: float = 0.0  # alpha 3: devices receive as many tokens

    def __post_init__(self) -> None:
        check_weights(self, "device_loss", "expert", "device", "communication")

    @property
    def on(self) -> bool:
        """Whether any of them is."""
        return max(self.expert, self.device, self.communication) > 0


@dataclass
class RouterConfig:
    """How a token's experts are chosen and weighted, and kept equally busy; docs/decisions/balancing.md has formulas.

    A loss of weight 0 is off; all that are on add up. They are no empty slots, which a command line could not fill.
    """

    score: Score = MISSING
    normalize: bool = MISSING  # the chosen weights are divided by their sum
    scale: float = MISSING  # of the chosen weights
    n_groups: int = 1
    top_groups: int = 1  # groups from which a token may choose
    group_score: GroupScore = GroupScore.best_two
    bias: bool = False  # trained, of the logits (gpt-oss)
    softcap: float | None = None  # logits become softcap · tanh(logits / softcap) (Grok 2.5)
    balance_rate: float | None = None  # step of the balancing bias at each update; 0 keeps it still; None: no such bias
    balance_loss: float = 0.0  # weight of the sequence-wise loss (DeepSeek-V3)
    switch_loss: SwitchLossConfig = field(default_factory=SwitchLossConfig)  # (Mixtral, Qwen3)
    device_loss: DeviceLossConfig = field(default_factory=DeviceLossConfig)  # (DeepSeek-V2)
    z_loss: float = 0.0  # weight of the mean of logsumexp(logits)², ST-MoE, arXiv 2202.08906, equation 5

    def __post_init__(self) -> None:
        check_above_0(self, "router", "scale", "n_groups", "top_groups", "softcap")
        within = self.top_groups <= self.n_groups
        check(within, "router.top_groups", self.top_groups, f"1 to n_groups ({self.n_groups})")
        check_weights(self, "router", "balance_rate", "balance_loss", "z_loss")
        for key in ("device", "communication"):
            weight = getattr(self.device_loss, key)
            allowed = "0 where router.n_groups=1: groups are its devices"
            check(weight == 0 or self.n_groups > 1, f"router.device_loss.{key}", weight, allowed)

    @property
    def adds_loss(self) -> bool:
        """Whether a router adds anything to the loss that is trained on."""
        return self.balance_loss > 0 or self.switch_loss.weight > 0 or self.device_loss.on or self.z_loss > 0

    @property
    def counts_ahead(self) -> bool:
        """Whether it needs to know what all tokens of an update choose before the first gradient is made."""
        return self.switch_loss.weight > 0 and self.switch_loss.scope is BatchScope.global_batch


@dataclass
class MoEConfig:
    """Routed experts beside one shared expert of width ``d_shared``, which 0 leaves out."""

    n_experts: int = MISSING
    top_k: int = MISSING
    d_expert: int = MISSING
    d_shared: int = MISSING
    router: RouterConfig = MISSING
    activation: Activation = Activation.swiglu
    bias: bool = False  # of every matrix of every routed expert (gpt-oss)
    shared_gate: bool = False  # the shared expert's output times a sigmoid of the input (Qwen3-Next)
    scale_input: bool = False  # weights multiply what goes into an expert, not what comes out (Llama 4)

    def __post_init__(self) -> None:
        check_above_0(self, "moe", "n_experts", "top_k", "d_expert")
        check(self.d_shared >= 0, "moe.d_shared", self.d_shared, "0 or more")
        check(self.activation is not Activation.gelu, "moe.activation", self.activation, "one with a gate")
        check(
            bool(self.d_shared) or not self.shared_gate, "moe.shared_gate", self.shared_gate, "false without d_shared"
        )
        r = self.router
        divides = self.n_experts % r.n_groups == 0
        check(divides, "router.n_groups", r.n_groups, f"a divisor of n_experts ({self.n_experts})")
        two = r.group_score is GroupScore.best or r.n_groups == 1 or self.n_experts // r.n_groups >= 2
        check(two, "router.n_groups", r.n_groups, "groups of two experts or more: their best two are summed")
        reachable = self.n_experts // r.n_groups * r.top_groups
        check(self.top_k <= reachable, "moe.top_k", self.top_k, f"1 to {reachable}, the experts of top_groups groups")
