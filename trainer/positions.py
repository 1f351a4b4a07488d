"""Rotary angles that change while a model trains: another theta from an update on, as contexts are extended."""

from collections.abc import Sequence
from dataclasses import replace

from parallel.pipeline import Pipeline
from trainer.config_schedule import ThetaConfig
from zoo.attention import Attention
from zoo.block import Block
from zoo.config import BlockConfig, ModelConfig
from zoo.decoder import Decoder
from zoo.mla import MLA


def phases(config: ModelConfig, changes: Sequence[ThetaConfig]) -> list[ModelConfig]:
    """The model before any change, after the first, and so on; the first of them is ``config`` itself."""
    found = [config]
    for change in changes:
        kinds = change.kinds or list(config.blocks)
        blocks = {
            kind: _turned(block, change.theta) if kind in kinds else block for kind, block in found[-1].blocks.items()
        }
        found.append(replace(found[-1], blocks=blocks))
    return found


def turn(model: Decoder | Pipeline, config: ModelConfig) -> None:
    """Have a spread model compute with the rotary angles of ``config``, and say so in its checkpoints."""
    for part in model.parts() if isinstance(model, Pipeline) else [model]:
        part.config = config
        for number, block in zip(part.blocks, part.layers(), strict=True):
            _turn(block, config.layers[int(number)])
        for mtp in part.depths():
            _turn(mtp.block, config.layers[-1])
    model.config = config


def _turned(block: BlockConfig, theta: float) -> BlockConfig:
    """A kind of layer with another theta; as it is where it has none."""
    if block.mla is not None:
        return replace(block, mla=replace(block.mla, rope=replace(block.mla.rope, theta=theta)))
    if block.attention is not None and block.attention.rope is not None:
        return replace(block, attention=replace(block.attention, rope=replace(block.attention.rope, theta=theta)))
    return block


def _turn(block: Block, config: BlockConfig) -> None:
    mixer = block.mixer
    if isinstance(mixer, MLA) and config.mla is not None:
        mixer.config = replace(mixer.config, rope=config.mla.rope)
    if isinstance(mixer, Attention) and config.attention is not None:
        mixer.config = replace(mixer.config, rope=config.attention.rope)
