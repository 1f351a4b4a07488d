"""Random tiny models drawn from the shipped ones, families with experts or DeltaNet: ``from draws_moe import MOE``."""

from collections.abc import Callable

from draws import Draw, yarn

from zoo.config import ModelConfig


def draw_deepseek_v2(seed: int) -> ModelConfig:
    draw = Draw(seed, "deepseek_v2_236b")
    draw_mla(draw)
    draw_groups(draw)
    draw.each("moe__router", scale=draw.one_of(1, 16))
    return draw.config()


def draw_deepseek_v3(seed: int) -> ModelConfig:
    draw = Draw(seed, "deepseek_v3_671b")
    draw_mla(draw)
    draw_groups(draw)
    draw.each("moe__router", scale=draw.one_of(1, 2.5))
    draw.model(tied=draw.rng.random() < 0.2)
    return draw.config()


def draw_kimi_k2(seed: int) -> ModelConfig:
    draw = Draw(seed, "kimi_k2_1t")
    draw_mla(draw)
    turns = draw.one_of(0.4, 0.7)
    draw.each("mla__rope__scaling", low=turns, high=turns)  # equal, as published: a step, not a blend
    draw.each("moe", n_experts=draw.one_of(6, 16), top_k=draw.one_of(1, 3, 4))
    draw_experts(draw, shared=(1, 2))
    return draw.config()


def draw_mixtral(seed: int) -> ModelConfig:
    draw = Draw(seed, "mixtral_8x7b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=3)
    draw.each("moe", n_experts=draw.one_of(4, 8), top_k=draw.one_of(1, 2, 3))
    draw_experts(draw)
    return draw.config()


def draw_llama4(seed: int, name: str) -> ModelConfig:
    draw = Draw(seed, name)
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=5, context=64)  # the fourth has no positions
    original, factor = draw.one_of(12, 24), draw.one_of(2, 8.5)
    draw.each("attention__rope__scaling", original_context=original, factor=factor)
    draw.windows(chunk=draw.one_of(4, 7, 20))
    draw.each("attention__temperature", floor=draw.one_of(4, 9, 16), scale=draw.one_of(0.1, 0.4))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    draw.each("moe", n_experts=draw.one_of(4, 6), top_k=draw.one_of(1, 1, 2))
    draw_experts(draw, shared=(1,))
    return draw.config()


def draw_llama4_scout(seed: int) -> ModelConfig:
    return draw_llama4(seed, "llama4_scout")


def draw_llama4_maverick(seed: int) -> ModelConfig:
    return draw_llama4(seed, "llama4_maverick")


def draw_qwen3_moe(seed: int) -> ModelConfig:
    draw = Draw(seed, "qwen3_30b_a3b", "qwen3_235b_a22b")
    draw.heads((1, 3), (2, 2), (2, 8), dims=(8, 14, 16))
    draw.theta()
    draw.model(n_layers=3)
    draw.each("moe", n_experts=draw.one_of(6, 16), top_k=draw.one_of(1, 3, 4))
    draw_experts(draw)
    return draw.config()


def draw_gpt_oss(seed: int) -> ModelConfig:
    draw = Draw(seed, "gpt_oss_20b", "gpt_oss_120b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(8, 14, 16))
    draw.theta()
    scaling = yarn(draw)
    draw.model(n_layers=3, context=int(scaling["factor"] * scaling["original_context"]))
    draw.each("attention__rope__scaling", **scaling)
    draw.windows(window=draw.one_of(1, 5, 12))
    draw.each("moe", n_experts=draw.one_of(4, 8), top_k=draw.one_of(1, 2, 4))
    draw_experts(draw)
    return draw.config()


def draw_grok2(seed: int) -> ModelConfig:
    draw = Draw(seed, "grok2_270b")
    draw.heads((1, 4), (2, 2), (2, 6), dims=(4, 8, 14))
    draw.theta()
    draw.model(n_layers=3, logit_softcap=draw.one_of(2, 50))
    draw.each("attention", softcap=draw.one_of(1.5, 5, 30))
    draw.each("attention__temperature", floor=draw.one_of(4, 9, 16))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    draw.each("moe", n_experts=draw.one_of(4, 8), top_k=draw.one_of(2, 3))
    draw.each("moe__router", softcap=draw.one_of(1.5, 30))
    draw_experts(draw)
    return draw.config()


def draw_glm45(seed: int, name: str = "glm45_355b") -> ModelConfig:
    draw = Draw(seed, name)
    draw.heads((1, 4), (2, 2), (2, 6), dims=(8, 12, 20))
    draw.theta()
    draw.model(n_layers=3, prefix=draw.base.prefix[:1] * (seed % 3))
    draw.each("mlp", d_ff=draw.one_of(24, 50))
    draw.each("moe", n_experts=draw.one_of(6, 16), top_k=draw.one_of(1, 3, 4))
    draw.each("moe__router", scale=draw.one_of(1, 2.5))
    draw_experts(draw, shared=(1, 2))
    return draw.config()


def draw_glm45_air(seed: int) -> ModelConfig:
    return draw_glm45(seed, "glm45_air_106b")


def draw_qwen3_next(seed: int) -> ModelConfig:
    draw = Draw(seed, "qwen3_next_80b_a3b")
    draw.heads((1, 3), (2, 2), (2, 4), dims=(8, 16, 24))
    draw.theta()
    eps = draw.one_of(1e-3, 1e-2)  # as the widths below, to keep what DeltaNet's norm divides by away from zero
    draw.model(n_layers=4, norm__eps=eps)  # the fourth is attention
    draw.each("attention__qk_norm", eps=eps)
    draw.each("deltanet__norm", eps=eps)
    n_k_heads, per_key = draw.one_of(1, 2, 3), draw.one_of(1, 2, 3)
    draw.each("deltanet", n_k_heads=n_k_heads, n_v_heads=n_k_heads * per_key, k_dim=draw.one_of(12, 16, 24))
    draw.each("deltanet", v_dim=draw.one_of(12, 16, 20), conv=draw.one_of(2, 4))
    draw.each("moe", n_experts=draw.one_of(6, 16), top_k=draw.one_of(1, 3, 4), d_expert=draw.one_of(8, 12))
    draw.each("moe", d_shared=draw.one_of(6, 16))
    return draw.config()


def draw_mla(draw: Draw) -> None:
    """Draw latent attention, YaRN at work or at rest, and 0 to 2 dense layers of 3."""
    scaling = yarn(draw)
    mscale = draw.one_of(1, 0.7)
    rests = draw.seed % 4 == 3
    draw.model(
        n_layers=3,
        d_model=draw.one_of(30, 40),
        context=int(scaling["original_context"] * (1 if rests else scaling["factor"])),
        prefix=draw.base.prefix[:1] * (draw.seed % 3),
    )
    draw.each("mla", n_heads=draw.one_of(1, 2, 5), q_rank=[12, None, 20][draw.seed % 3], kv_rank=draw.one_of(8, 18))
    draw.each("mla", nope_dim=draw.one_of(6, 8), rope_dim=draw.one_of(4, 8, 16), v_dim=draw.one_of(4, 8, 20))
    draw.each("mla__rope", theta=draw.one_of(50, 10_000))
    draw.each("mla__rope__scaling", **scaling, mscale=1, mscale_all_dim=mscale)
    draw.each("mlp", d_ff=draw.one_of(24, 50))


def draw_groups(draw: Draw) -> None:
    """Draw experts in groups, of which a token chooses from some."""
    n_groups, per_group = [(4, 4), (2, 4), (1, 6), (4, 2), (8, 2)][draw.seed % 5]
    top_groups = draw.rng.randint(1, max(1, n_groups - 1))
    draw.each("moe", n_experts=n_groups * per_group, top_k=draw.rng.randint(1, min(4, top_groups * per_group)))
    draw.each("moe__router", n_groups=n_groups, top_groups=top_groups)
    if n_groups == 1:  # a device would be all experts
        draw.each("moe__router__device_loss", device=0.0, communication=0.0)
    draw_experts(draw, shared=(1, 2))


def draw_experts(draw: Draw, *, shared: tuple[int, ...] = ()) -> None:
    """Draw the width of an expert, and the shared expert's, in so many of it."""
    d_expert = draw.one_of(8, 12)
    draw.each("moe", d_expert=d_expert, d_shared=d_expert * draw.one_of(*shared) if shared else 0)


MOE: dict[str, Callable[[int], ModelConfig]] = {
    "deepseek_v2": draw_deepseek_v2,
    "deepseek_v3": draw_deepseek_v3,
    "kimi_k2": draw_kimi_k2,
    "mixtral": draw_mixtral,
    "llama4_scout": draw_llama4_scout,
    "llama4_maverick": draw_llama4_maverick,
    "qwen3_moe": draw_qwen3_moe,
    "gpt_oss": draw_gpt_oss,
    "grok2": draw_grok2,
    "glm45": draw_glm45,
    "glm45_air": draw_glm45_air,
    "qwen3_next": draw_qwen3_next,
}
