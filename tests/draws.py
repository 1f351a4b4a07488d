"""Random tiny models drawn from the shipped ones, dense families: ``from draws import Draw, DENSE``.

A draw keeps the slots, the kinds of layer and their order that a YAML of published sizes has, shrinks its widths and
varies its values; what it does not vary (GELU's form, the clamps, √2) is what the YAML says.
"""

import random
from collections.abc import Callable
from typing import Any

from models import compose

from zoo.config import ModelConfig


class Draw:
    """One of some shipped models, by seed, and the changes that shrink it."""

    def __init__(self, seed: int, *names: str) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.name = names[seed % len(names)]
        self.base = compose(self.name)
        self.changes: dict[str, Any] = {}
        eps = self.one_of(1e-6, 1e-5, 1e-3)
        self.model(vocab_size=self.one_of(50, 97), norm__eps=eps, n_mtp=0)
        self.each("attention__qk_norm", eps=eps)

    def one_of(self, *values: Any) -> Any:
        """One of some values."""
        return self.rng.choice(values)

    def model(self, **changes: Any) -> None:
        """Change fields of the model itself."""
        self.changes |= changes

    def each(self, slot: str, **changes: Any) -> None:
        """Change fields of a slot in every kind of layer that fills it: ``each("attention__rope", theta=50)``."""
        for kind, block in self.base.blocks.items():
            part: Any = block
            for step in slot.split("__"):
                part = None if part is None else getattr(part, step)
            if part is not None:
                self.changes |= {f"blocks__{kind}__{slot}__{field}": value for field, value in changes.items()}

    def windows(self, **changes: Any) -> None:
        """Change window, chunk or temperature's floor where one is set."""
        for kind, block in self.base.blocks.items():
            for field, value in changes.items():
                if getattr(block.attention, field) is not None:
                    self.changes[f"blocks__{kind}__attention__{field}"] = value

    def heads(self, *kv_and_all: tuple[int, int], dims: tuple[int, ...], square: bool = False) -> None:
        """Draw (n_kv_heads, n_heads) and head_dim; d_model is their product if ``square``, else not."""
        n_kv_heads, n_heads = self.one_of(*kv_and_all)
        head_dim = self.one_of(*dims)
        self.each("attention", n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)
        self.model(d_model=n_heads * head_dim if square else n_heads * (24 // n_heads + self.one_of(1, 2)))

    def theta(self) -> None:
        """Draw the base of rotary frequencies, often a small one, whose slow pairs turn too; equal ones stay equal."""
        drawn: dict[float, float] = {}
        for kind, block in self.base.blocks.items():
            if block.attention is not None and block.attention.rope is not None:
                published = block.attention.rope.theta
                theta = drawn.setdefault(published, self.one_of(30, 200, 10_000, published))
                self.changes[f"blocks__{kind}__attention__rope__theta"] = theta

    def config(self) -> ModelConfig:
        """The model drawn."""
        return compose(self.name, **self.changes)


def draw_gpt2(seed: int) -> ModelConfig:
    draw = Draw(seed, "gpt2_124m", "gpt2_1558m", "gpt2_355m", "gpt2_774m")
    draw.heads((2, 2), (3, 3), (5, 5), dims=(5, 8), square=True)
    draw.model(n_layers=3, context=draw.one_of(70, 128))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_llama3(seed: int) -> ModelConfig:
    draw = Draw(seed, "llama31_8b", "llama3_8b", "llama32_1b", "llama31_405b", "llama3_70b", "llama31_70b")
    draw.heads((1, 4), (2, 2), (2, 6), (3, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=3, context=64)
    original, factor = draw.one_of(12, 24), draw.one_of(2, 8.5)
    draw.each("attention__rope__scaling", original_context=original, factor=factor, high=draw.one_of(2, 4))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_olmo2(seed: int) -> ModelConfig:
    draw = Draw(seed, "olmo2_7b", "olmo2_32b", "olmo2_13b")
    draw.heads((2, 2), (3, 3) if draw.name != "olmo2_32b" else (2, 6), dims=(4, 8, 10), square=True)
    draw.theta()
    draw.model(n_layers=3)
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_gemma3(seed: int) -> ModelConfig:
    draw = Draw(seed, "gemma3_27b", "gemma3_1b", "gemma3_4b", "gemma3_12b")
    draw.heads((1, 4), (2, 2), (2, 4), dims=(6, 8, 16))
    draw.theta()
    draw.model(n_layers=7)  # the pattern, which is five local layers and a global one, and what is left over
    draw.each("attention", scale_dim=draw.one_of(7, 13))
    draw.each("attention__rope__scaling", factor=draw.one_of(2, 8))
    draw.windows(window=draw.one_of(1, 5, 12))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_mistral(seed: int) -> ModelConfig:
    draw = Draw(seed, "mistral_7b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=3)
    draw.windows(window=draw.one_of(2, 4, 9, 20))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_mistral_small(seed: int) -> ModelConfig:
    draw = Draw(seed, "mistral_small_24b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=3)
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_qwen3(seed: int) -> ModelConfig:
    draw = Draw(seed, "qwen3_06b", "qwen3_06b", "qwen3_8b", "qwen3_14b", "qwen3_17b", "qwen3_32b", "qwen3_4b")
    draw.heads((1, 3), (2, 2), (2, 8), dims=(8, 14, 16))
    draw.theta()
    draw.model(n_layers=3)
    if seed % 2:  # as Qwen3's model card has it for long inputs: phases grow, the softmax scale does not
        scaling = yarn(draw)
        draw.each("attention__rope", scaling=scaling | {"kind": "yarn", "mscale": 1, "mscale_all_dim": 0})
        draw.model(context=int(scaling["factor"] * scaling["original_context"]))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_smollm3(seed: int) -> ModelConfig:
    draw = Draw(seed, "smollm3_3b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=5)  # the fourth has no positions
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def draw_chameleon(seed: int) -> ModelConfig:
    draw = Draw(seed, "chameleon_7b")
    qk_eps = draw.base.layers[0].attention.qk_norm.eps
    draw.each("attention__qk_norm", eps=qk_eps)  # which transformers does not take from its config
    draw.heads((2, 2), (4, 4), (2, 4), dims=(6, 8), square=True)
    draw.theta()
    draw.model(n_layers=3)
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    return draw.config()


def yarn(draw: Draw) -> dict[str, Any]:
    """Scaling whose bounds fall inside the few pairs of a small head: with 1 and 32 turns all would be divided."""
    original, high = draw.one_of(16, 24), draw.one_of(0.5, 1)
    return {"factor": draw.one_of(4, 40), "original_context": original, "low": 0.25, "high": high}


DENSE: dict[str, Callable[[int], ModelConfig]] = {
    "gpt2": draw_gpt2,
    "llama3": draw_llama3,
    "olmo2": draw_olmo2,
    "gemma3": draw_gemma3,
    "mistral": draw_mistral,
    "mistral_small": draw_mistral_small,
    "qwen3": draw_qwen3,
    "smollm3": draw_smollm3,
    "chameleon": draw_chameleon,
}
