"""Initial values, each a function of the seed, the parameter's name and the element's place: no layout changes them."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.config import BlockConfig, ModelConfig
from zoo.config_mixer import NormConfig

DECAY_RATES = (0.01, 16.0)
"""Between which Gated DeltaNet's decay rates lie at the start, evenly (transformers' Qwen3-Next; unpublished)."""

CHUNK = 2**17
"""Numbers drawn at a time: scratch memory stays near 3 MB, and Python's part of the time is lost in the arithmetic."""

BLOCK = 4
"""Words that one step of Philox's counter gives."""


def initial(
    name: str, shape: torch.Size, *, config: ModelConfig, seed: int, part: tuple[slice, ...] | None = None
) -> Tensor:
    """Initial value of one parameter or of a part of it, fp32 on the CPU; arguments as of ``fill_initial``."""
    values = torch.empty([len(each) for each in _ranges(shape, part)], dtype=torch.float32, device="cpu")
    fill_initial(values, name=name, shape=shape, config=config, seed=seed, part=part)
    return values


@torch.no_grad()
def fill_initial(
    target: Tensor,
    *,
    name: str,
    shape: torch.Size,
    config: ModelConfig,
    seed: int,
    part: tuple[slice, ...] | None = None,
) -> None:
    """Write one parameter's initial values, or a part of them, without making the rest.

    Matrices are normal with ``config.init.std``; norms multiply by one; biases and sinks are zero. Values are rounded
    to fp32 first, so that all dtypes start alike.

    Example: rows 2 and 3 of a parameter of shape (5, 3) are numbers 6 to 11 of its sequence, drawn alone.

    Args:
        target: takes the values; any device, dtype and strides; has the shape of ``part``.
        name: of the parameter in the whole model.
        shape: of the whole parameter.
        config: of the whole model.
        seed: of the run.
        part: a range for each dim of ``shape``; all of it by default.
    """
    ranges = _ranges(shape, part)
    assert target.shape == tuple(map(len, ranges)), f"{name}: {target.shape=} {shape=} {part=}"
    constant = _constant(name, config)
    if constant is not None:
        target.fill_(constant)
        return
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")  # Philox's has 128 bits
    values = _values(name, config)
    for box, corner in _boxes(target, corner=[each.start for each in ranges]):
        numbers = values(_uniform(_words(key, shape, corner=corner, sizes=box.shape)))
        box.copy_(numbers.to(torch.float32).view(box.shape))


def initialize(model: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill a model that lies whole on one device: parameters by ``fill_initial``, buffers with zeros."""
    for name, parameter in model.named_parameters():
        fill_initial(parameter, name=name, shape=parameter.shape, config=config, seed=seed)
    for buffer in model.buffers():
        buffer.zero_()


def _ranges(shape: torch.Size, part: tuple[slice, ...] | None) -> list[range]:
    """The indices along each dim that a part has."""
    if part is None:
        return [range(n) for n in shape]
    ranges = [range(n)[along] for n, along in zip(shape, part, strict=True)]
    assert all(each.step == 1 for each in ranges), f"{part=}"
    return ranges


def _boxes(target: Tensor, *, corner: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Cut a tensor into views of at most ``CHUNK`` elements, each with its corner's index in the whole."""
    if target.numel() <= CHUNK:
        if target.numel():
            yield target, corner
        return
    dim = next(d for d, n in enumerate(target.shape) if n > 1)
    for piece in target.split(max(1, CHUNK * target.shape[dim] // target.numel()), dim):
        yield from _boxes(piece, corner=corner)
        corner = [*corner[:dim], corner[dim] + piece.shape[dim], *corner[dim + 1 :]]


def _words(key: int, shape: torch.Size, *, corner: list[int], sizes: torch.Size) -> NDArray[np.uint64]:
    """One random word for each element of a box: word i of ``key`` is that of the element with flat index i.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) computes words from a counter, so any
    run of them can be had without those before; numpy keeps its streams fixed (NEP 19).

    Example: columns 1 and 2 of two rows of five are the runs [1, 2] and [6, 7].
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inner = max((dim for dim in range(len(shape)) if sizes[dim] < shape[dim]), default=0)  # runs go on to the end
    length = math.prod(sizes[inner:])
    first = sum(i * stride for i, stride in zip(corner, strides, strict=True))
    stream, at, runs = np.random.Philox(key=key), 0, []
    for index in itertools.product(*map(range, sizes[:inner])):
        start = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        stream.advance(start // BLOCK - at)  # drops the rest of a block that was begun; backwards if it is needed again
        runs.append(stream.random_raw(start % BLOCK + length)[start % BLOCK :])
        at = -(-(start + length) // BLOCK)
    return runs[0] if len(runs) == 1 else np.concatenate(runs)


def _uniform(words: NDArray[np.uint64]) -> Tensor:
    """Words to float64 evenly between 0 and 1, both excluded: the odd multiples of 2**-53. Overwrites the words.

    52 bits become the fraction of a number from 1 up to 2. All that follows is exact or one number at a time, and so
    does not depend on where in a chunk a number lies.
    """
    words >>= np.uint64(12)
    words |= np.uint64(0x3FF0000000000000)
    numbers = words.view(np.float64)
    numbers -= 1 - 2**-53
    return torch.from_numpy(numbers)


def _constant(name: str, config: ModelConfig) -> float | None:
    """The one value of all elements of a parameter; None where they are random."""
    leaf = name.rpartition(".")[2]
    if leaf == "dt_bias":
        return 1
    if leaf.endswith("bias") or leaf == "sinks":
        return 0
    return 1 - _norm(name, config).offset if name.endswith("norm.weight") else None


def _values(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """How uniform float64 numbers become a parameter's values, one each (the inverse of their distribution)."""
    if name.endswith("log_decay"):
        low, high = DECAY_RATES
        return lambda u: u.mul_(high - low).add_(low).log_()
    init = config.init
    std = init.std
    if init.scale_residual and ".".join(name.split(".")[-2:]) in ("wo.weight", "down.weight", "experts.down"):
        std /= math.sqrt(2 * config.n_layers)
    if init.cutoff is None:
        return lambda u: torch.special.ndtri(u).mul_(std)
    bound, outside = init.cutoff, math.erfc(init.cutoff / math.sqrt(2)) / 2
    return lambda u: torch.special.ndtri(u.mul_(1 - 2 * outside).add_(outside)).clamp_(-bound, bound).mul_(std)


def _norm(name: str, config: ModelConfig) -> NormConfig:
    """Config of the norm whose weight this is.

    Example: blocks.3.mixer.q_norm.weight is the query norm of the fourth layer's mixer, norm.weight the model's.
    """
    parts = name.split(".")
    if "mixer" not in parts:
        return config.norm
    layer: BlockConfig = config.layers[int(parts[1]) if parts[0] == "blocks" else -1]
    if layer.mla is not None:
        return layer.mla.norm
    if layer.deltanet is not None:
        return layer.deltanet.norm
    assert layer.attention is not None and layer.attention.qk_norm is not None, f"{name=}"
    return layer.attention.qk_norm
