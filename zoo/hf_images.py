"""Chameleon's image tokenizer, which the zoo does not build: transformers' class cannot be made without one.

Reading passes over it. Writing puts the smallest that the class takes, of zeros, beside the language model; with no
image tokens named in ``vocabulary_map`` its logits are those of the language model, none masked.
"""

import torch
from torch import Tensor

PREFIX = "model.vqmodel."
CHANNELS = 32  # the least that its group norms take

FIELDS: dict[str, object] = {
    "vocabulary_map": {},
    "vq_config": {
        "embed_dim": 1,
        "num_embeddings": 1,
        "latent_channels": 1,
        "resolution": 1,
        "base_channels": CHANNELS,
        "channel_multiplier": [1],
        "num_res_blocks": 0,
        "attn_type": "none",
    },
}


def blank(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of that tokenizer, 0.15 MB in fp32, by key."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (1, 1)}
    convolutions = {"encoder.conv_in": (CHANNELS, 3, 3, 3), "encoder.conv_out": (1, CHANNELS, 3, 3)}
    convolutions |= {"quant_conv": (1, 1, 1, 1), "post_quant_conv": (1, 1, 1, 1)}
    norms = ["encoder.norm_out"]
    for block in ("encoder.mid.block_1", "encoder.mid.block_2"):
        convolutions |= {f"{block}.conv{i}": (CHANNELS, CHANNELS, 3, 3) for i in (1, 2)}
        norms += [f"{block}.norm{i}" for i in (1, 2)]
    for name, shape in convolutions.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (CHANNELS,), f"{name}.bias": (CHANNELS,)}
    return {PREFIX + name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
