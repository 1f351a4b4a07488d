"""Models to and from Hugging Face folders, as transformers reads and writes them; transformers itself is not needed.

What a folder holds is streamed: beside the model, writing needs the memory of two shards and one tensor, reading that
of one tensor. Names and layouts are in ``hf_names.py``, ``config.json`` in ``hf_config.py``, files in ``hf_files.py``.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.decoder import Decoder
from zoo.hf_config import parse, render
from zoo.hf_fields import HFError, read_json
from zoo.hf_files import CONFIG, INDEX, Shards, Stored, carry, dtype_name, whole_folder, write_json
from zoo.hf_names import IGNORED, Place, copies, mtp_prefix, places

SHARD_BYTES = 5_000_000_000

MTP_LAYER_OF_TRANSFORMERS = 61
"""transformers 5.23 passes over, and finds multi-token modules in, this layer only (DeepSeek-V3's own). Modules of a
model of any other depth go into files that no index lists, or it would warn of unexpected keys."""


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """Build the model that a folder holds, on the CPU.

    Args:
        folder: ``config.json`` and safetensors files.
        dtype: of the parameters; None: as stored. Router biases stay in at least fp32.

    Raises:
        HFError: the folder is incomplete or damaged, or asks for what the zoo does not build.
    """
    config = read_config(folder)
    stored = tensors(folder, config=config)
    with torch.device("meta"), _default_dtype(torch.promote_types(dtype or torch.float32, torch.float32)):
        model = Decoder(config)
    buffers = dict(model.named_buffers())
    state = {}
    for name, tensor in stored.items():
        wanted = tensor.dtype if dtype is None else dtype
        state[name] = tensor.to(buffers[name].dtype if name in buffers else wanted)
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # a counter, which no checkpoint holds
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    return model


def save(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Sequence[str | Path] | None = None,
    bos: int | None = None,
    eos: int | None = None,
    replace: bool = False,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads; see ``write`` for arguments and errors."""
    state = model.state_dict()
    write(model.config, state.__getitem__, folder=folder, tokenizer=tokenizer, bos=bos, eos=eos, replace=replace)


def read_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json``.

    Multi-token modules that it declares and no file holds are left out with a warning: transformers declares one by
    default and saves none.

    Raises:
        HFError: it is missing, unreadable or asks for what the zoo does not build.
    """
    folder = Path(folder)
    config = parse(read_json(folder / CONFIG), source=str(folder / CONFIG))
    if config.n_mtp:
        keys = Stored(folder).keys()
        prefixes = tuple(mtp_prefix(config, depth) + "." for depth in range(config.n_mtp))
        if not any(key.startswith(prefixes) for key in keys):
            declared = f"{folder / CONFIG} declares {config.n_mtp} multi-token modules and no file holds any"
            warnings.warn(f"{declared}: read without", stacklevel=2)
            config = dataclasses.replace(config, n_mtp=0)
    return config


def tensors(folder: str | Path, *, config: ModelConfig) -> Mapping[str, Tensor]:
    """The tensors of a folder by our names, each read when it is asked for.

    Raises:
        HFError: a tensor is missing, superfluous, of another shape or dtype, or differs from what it should repeat.
    """
    return _Tensors(Path(folder), config)


def write(
    config: ModelConfig,
    get: Callable[[str], Tensor],
    *,
    folder: str | Path,
    tokenizer: Sequence[str | Path] | None = None,
    bos: int | None = None,
    eos: int | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder from tensors that are fetched one at a time; until all of it is written, none of it is there.

    Args:
        config: of the model.
        get: gives the one tensor of ours with this name, whole.
        folder: new or empty.
        tokenizer: files to copy beside the weights.
        bos: token that begins a text, for ``config.json``; None: null.
        eos: token that ends one.
        replace: whether a folder of this kind that is already there gives way.
        shard_bytes: most bytes of a file.

    Raises:
        HFError: the family's transformers class cannot hold the model, the folder is occupied, or the disk is full.
    """
    fields = render(config)
    embed = get("embed.weight")
    fields |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None, "dtype": dtype_name(embed.dtype)}
    with whole_folder(Path(folder), replace=replace) as fresh:
        main = Shards(fresh, "model", limit=shard_bytes)
        aside = config.n_layers != MTP_LAYER_OF_TRANSFORMERS
        mtp = Shards(fresh, "mtp", limit=shard_bytes) if aside else main
        for name, place in places(config).items():
            shards = mtp if name.startswith("mtp.") else main
            tensor = get(name)
            for key, part in zip(place.keys, tensor if place.stacked else [tensor], strict=True):
                shards.add(key, part)
        for key, name in copies(config).items():
            if key != "lm_head.weight":  # of a tied model: transformers ties by itself
                mtp.add(key, get(name))
        listed = main.finish()
        if aside:
            mtp.finish()
        if len(set(listed.values())) > 1:
            write_json(fresh / INDEX, {"metadata": {"total_size": main.total}, "weight_map": listed})
        carry([Path(file) for file in tokenizer or ()], fresh)
        write_json(fresh / CONFIG, fields)


class _Tensors(Mapping[str, Tensor]):
    """Stored tensors under our names."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.stored = Stored(folder)
        self.places = places(config)
        with torch.device("meta"):
            self.shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
        assert self.shapes.keys() == self.places.keys(), f"{self.shapes.keys() ^ self.places.keys()}"
        self._check(folder, copies(config))

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if self._is_packed(place):
            assert place.packed is not None, f"{place=}"
            return self.stored.get(place.packed) if place.half is None else self.stored.half(place.packed, place.half)
        if not place.stacked:
            return self.stored.get(place.keys[0])
        first = self.stored.get(place.keys[0])
        bank = first.new_empty(self.shapes[name])
        for one, key in zip(bank, place.keys, strict=True):
            one.copy_(self.stored.get(key))
        return bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _is_packed(self, place: Place) -> bool:
        return place.packed is not None and place.packed in self.stored

    def _check(self, folder: Path, repeats: dict[str, str]) -> None:
        """Compare keys, shapes and dtypes with what the config needs, and copies with their originals."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, place in self.places.items():
            shape = self.shapes[name]
            if self._is_packed(place):
                assert place.packed is not None, f"{place=}"
                doubled = shape if place.half is None else (shape[0], 2 * shape[1], *shape[2:])
                wanted[place.packed] = doubled
            else:
                wanted |= dict.fromkeys(place.keys, shape[1:] if place.stacked else shape)
        keys = self.stored.keys()
        for key in wanted:
            if key not in keys:
                raise HFError(f"{folder}: lacks {key} of shape {wanted[key]}{_more(wanted.keys() - keys)}")
        extra = {key for key in keys - wanted.keys() - repeats.keys() if not key.endswith(IGNORED)}
        if extra:
            raise HFError(f"{folder}: holds {min(extra)}, of which {CONFIG} says nothing{_more(extra)}")
        for key, shape in wanted.items():
            if self.stored.shape(key) != shape:
                raise HFError(f"{folder}: {key} has shape {self.stored.shape(key)}: must be {shape}")
        for key, name in repeats.items():
            if key not in keys:
                continue
            same = self.stored.shape(key) == self.shapes[name]
            if not (same and torch.equal(self.stored.get(key), self[name])):
                raise HFError(f"{folder}: {key} must be equal to {self.places[name].keys[0]}")


def _more(keys: set[str]) -> str:
    return f" ({len(keys) - 1} more like it)" if len(keys) > 1 else ""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let constructors take this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
