"""Models to and from Hugging Face folders, as transformers reads and writes them; transformers itself is not needed.

What a folder holds is streamed: beside the model, reading and writing need the memory of one stored tensor and one of
ours. What is a family's own is one row of a table: ``hf_dense.py``, ``hf_sparse.py``.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.decoder import Decoder
from zoo.hf_config import check_mtp, parse, render
from zoo.hf_families import BY_NAME
from zoo.hf_fields import HFError, read_json
from zoo.hf_files import CONFIG, INDEX, Shards, Stored, carry, dtype_name, whole_folder, write_json
from zoo.hf_images import blank
from zoo.hf_places import Spelling, copies, mtp_passed_over, mtp_prefix, places

SHARD_BYTES = 5_000_000_000


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
    buffers = {name for name, _ in model.named_buffers()}
    state = {}
    for name, tensor in stored.items():
        wanted = tensor.dtype if dtype is None else dtype
        state[name] = tensor.to(torch.promote_types(wanted, torch.float32) if name in buffers else wanted)
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
    eos: int | Sequence[int] | None = None,
    replace: bool = False,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads; see ``write`` for arguments and errors.

    Chameleon's is loaded by ``AutoModelForImageTextToText``, Grok's, which has no class there, by ``load`` alone.
    """
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
    raw = read_json(folder / CONFIG)
    config = parse(raw, source=str(folder / CONFIG))
    if config.n_mtp:
        keys = Stored(folder).keys()
        prefixes = tuple(mtp_prefix(config, depth) for depth in range(config.n_mtp))
        if not any(key.startswith(prefixes) for key in keys):
            if raw.keys() & {"num_nextn_predict_layers", "num_mtp_layers"}:
                declared = f"{folder / CONFIG} declares {config.n_mtp} multi-token modules and no file holds any"
                warnings.warn(f"{declared}: read without", stacklevel=2)
            config = dataclasses.replace(config, n_mtp=0)
    check_mtp(config)
    return config


def token_ids(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` gives as the tokens that begin and end a text, for ``write``: ``bos`` and ``eos``.

    Raises:
        HFError: one is no number of a token.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)
    found = {"bos": raw.get("bos_token_id"), "eos": raw.get("eos_token_id")}
    for name, value in found.items():
        each = value if isinstance(value, list) and name == "eos" else [] if value is None else [value]
        if any(type(token) is not int for token in each):
            allowed = "a token's number" + ", or a list of them" * (name == "eos")
            raise HFError(f"{path}: {name}_token_id={json.dumps(value)}: must be {allowed}")
    return found


def tensors(folder: str | Path, *, config: ModelConfig) -> "Tensors":
    """The tensors of a folder by our names, each read when it is asked for.

    Raises:
        HFError: a tensor is missing, superfluous, of another shape or dtype, or differs from what it should repeat.
    """
    return Tensors(Path(folder), config)


def write(
    config: ModelConfig,
    get: Callable[[str], Tensor],
    *,
    folder: str | Path,
    tokenizer: Sequence[str | Path] | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
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
        eos: token that ends one, or several that do.
        replace: whether a folder that holds nothing but what we write gives way.
        shard_bytes: most bytes of a file.

    Raises:
        HFError: the family's transformers class cannot hold the model, the folder is occupied, or the disk is full.
    """
    fields = render(config)
    dtype = get("embed.weight").dtype
    fields |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None, "dtype": dtype_name(dtype)}
    files = [Path(file) for file in tokenizer or ()]
    with whole_folder(Path(folder), replace=replace, carried=[file.name for file in files]) as fresh:
        main = Shards(fresh, "model", limit=shard_bytes)
        aside = not mtp_passed_over(config)
        mtp = Shards(fresh, "mtp", limit=shard_bytes) if aside else main
        done: set[str] = set()
        for name, spellings in places(config).items():
            if name not in done:
                _add(mtp if name.startswith("mtp.") else main, spellings[0], get)
                done |= spellings[0][0].parts.keys()
        for key, name in copies(config).items():
            if key != "lm_head.weight":  # of a tied model: transformers ties by itself
                mtp.add(key, get(name))
        for key, tensor in (blank(dtype) if "vq_config" in fields else {}).items():
            main.add(key, tensor)
        listed = main.finish()
        if aside:
            mtp.finish()
        if len(set(listed.values())) > 1:
            write_json(fresh / INDEX, {"metadata": {"total_size": main.total}, "weight_map": listed})
        carry(files, fresh)
        write_json(fresh / CONFIG, fields)


def _add(shards: Shards, spelling: Spelling, get: Callable[[str], Tensor]) -> None:
    """Write what holds one tensor of ours; each of ours is fetched once."""
    if len(spelling) == 1:
        shards.add(spelling[0].key, spelling[0].assemble(get))
        return
    (name,) = spelling[0].parts
    bank = get(name)
    for layout in spelling:
        shards.add(layout.key, layout.assemble(lambda _: bank))


class Tensors(Mapping[str, Tensor]):
    """Stored tensors under our names."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        family = BY_NAME.get(config.family)
        self.stored = Stored(folder, prefix=family.names.prefix if family else "")
        self.places = {name: self._held(spellings) for name, spellings in places(config).items()}
        self._check(folder, copies(config), family.names.ignored if family else re.compile(r"(?!)"))

    def __getitem__(self, name: str) -> Tensor:
        """Read one; of a bank no more than one expert's matrices are in memory beside it."""
        spelling = self.places[name]
        first, shape = spelling[0], spelling[0].parts[name]
        if len(shape) != 3:
            return first.extract(self.stored.get(first.key), name)
        slabs = (self.stored.get(one.key)[None] for one in spelling) if first.row is not None else None
        bank: Tensor | None = None
        for place, slab in enumerate(slabs or self.stored.slabs(first.key)):
            bank = slab.new_empty(shape) if bank is None else bank
            bank[place : place + 1] = first.extract(slab, name)
        assert bank is not None, f"{name=}"
        return bank

    def empty(self, name: str) -> Tensor:
        """One without its values, on the meta device."""
        first = self.places[name][0]
        return torch.empty(first.parts[name], dtype=self.stored.dtype(first.key), device="meta")

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _held(self, spellings: list[Spelling]) -> Spelling:
        """The spelling that the files have; the first if none."""
        for spelling in spellings:
            if spelling[0].key in self.stored:
                return spelling
        return spellings[0]

    def _check(self, folder: Path, repeats: dict[str, str], ignored: re.Pattern[str]) -> None:
        """Compare keys, shapes and dtypes with what the config needs, and copies with their originals."""
        wanted = {one.key: one.shape for spelling in self.places.values() for one in spelling}
        keys = self.stored.keys()
        for key in wanted:
            if key not in keys:
                raise HFError(f"{folder}: lacks {key} of shape {wanted[key]}{_more(wanted.keys() - keys)}")
        extra = {key for key in keys - wanted.keys() - repeats.keys() if not ignored.fullmatch(key)}
        if extra:
            raise HFError(f"{folder}: holds {min(extra)}, of which {CONFIG} says nothing{_more(extra)}")
        for key, shape in wanted.items():
            if self.stored.shape(key) != shape:
                raise HFError(f"{folder}: {key} has shape {self.stored.shape(key)}: must be {shape}")
        for key, name in repeats.items():
            if key not in keys:
                continue
            original = self.places[name][0]
            same = self.stored.shape(key) == original.shape
            if not (same and torch.equal(self.stored.get(key), self[name])):
                raise HFError(f"{folder}: {key} must be equal to {original.key}")


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
