"""QK-Clip: after an update, weights of queries and keys shrink where a head's largest attention logit was above tau.

Source: Kimi K2, arXiv 2507.20534, section 2.1. With S the largest logit of a head over the global batch, its logits are
to become gamma = tau / S times what they are. As products of queries and keys they do, where queries take gamma^alpha
and keys gamma^(1 - alpha):

- Attention: rows of the head in ``wq`` and ``wk``, biases too. Heads that share a key head take one gamma, that of the
  largest logit among them (Megatron-LM, ``Attention.clip_qk``).
- Latent attention: likewise the rows without position in ``wq`` and ``wkv``. The rotated key, which all heads share,
  stays; the rotated rows of ``wq`` take the whole gamma. Rows of values in ``wkv`` stay.

Every rank knows all logits (``trainer/attention_logits.py``) and scales the rows that it has, of the parameters in the
dtype that they are kept in; what is computed with is made of these. A head below tau is multiplied by one: bitwise the
same. An infinite logit or one that is no number scales nothing: the update is lost, and others say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel import reduce
from parallel.pipeline import Pipeline
from trainer.attention_logits import attending
from trainer.config_clip import QKClipConfig
from zoo.config import BlockConfig
from zoo.decoder import Decoder


@dataclass(frozen=True)
class _Own:
    """A parameter that may shrink, and which of its rows this rank has.

    Attributes:
        layer: name of its layer.
        key: its name in the mixer.
        parameter: as the model has it.
        rows: of the whole.
    """

    layer: str
    key: str
    parameter: nn.Parameter
    rows: slice


class QKClip:
    """Scales the queries' and keys' weights of a model."""

    def __init__(self, model: Decoder | Pipeline, config: QKClipConfig) -> None:
        """Find the rows that this rank has; no communication."""
        self.config, self.layers = config, attending(model.config)
        self._own = []
        for name, parameter in model.named_parameters():
            layer, _, key = name.partition(".mixer.")
            if layer in self.layers and key.partition(".")[0] in ("wq", "wk", "wkv"):
                view = reduce.view(model, name, parameter.detach())
                rows = reduce.part(view)[0] if isinstance(view, DTensor) else slice(None)
                self._own.append(_Own(layer, key, parameter, rows))

    @torch.no_grad()
    def update(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Scale by the largest logits (H,) of each layer; how many heads were above tau. No communication."""
        tau, alpha = self.config.tau, self.config.alpha
        factors = {
            name: _factors(layer, gammas(logits[name], tau=tau), alpha=alpha)
            for name, (layer, _) in self.layers.items()
        }
        for own in self._own:
            part = reduce.local(own.parameter.detach())
            factor = factors[own.layer][own.key.partition(".")[0]][own.rows].to(part)
            part.mul_(factor.view(-1, *[1] * (part.ndim - 1)))
        return torch.stack([(heads > tau).sum() for heads in logits.values()]).sum()


def gammas(logits: Tensor, *, tau: float) -> Tensor:
    """What each head's logits are to be multiplied by, from the largest of each: tau / S above tau, else 1."""
    above = (logits > tau) & logits.isfinite()
    return torch.where(above, tau / logits, 1.0)


def _factors(layer: BlockConfig, gamma: Tensor, *, alpha: float) -> dict[str, Tensor]:
    """What multiplies each row of a layer's weights, by their names in the mixer; from gamma (H,).

    Example: gamma 1 1/4 of two heads of one row, each with a key of its own, alpha 1/2: ``wq`` and ``wk`` 1 1/2.
    """
    if layer.mla is not None:
        c, whole = layer.mla, torch.ones_like(gamma)
        return {
            "wq": _rows((gamma**alpha, c.nope_dim), (gamma, c.rope_dim)),
            "wkv": _rows((gamma ** (1 - alpha), c.nope_dim), (whole, c.v_dim)),
        }
    assert layer.attention is not None and layer.attention.qk_norm is None, f"{layer=}"
    n_groups, width = layer.attention.n_kv_heads, layer.attention.head_dim
    shared = gamma.view(n_groups, -1).amin(dim=1)  # of the largest logit
    each = shared.repeat_interleave(len(gamma) // n_groups)
    return {"wq": _rows((each**alpha, width)), "wk": _rows((shared ** (1 - alpha), width))}


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    """A number for each row of a weight, whose heads come one after another: some rows of each take one factor each.

    Example: factors a b for one row and c d for two give a c c b d d.
    """
    return torch.cat([factor[:, None].expand(-1, n) for factor, n in parts], dim=1).flatten()
