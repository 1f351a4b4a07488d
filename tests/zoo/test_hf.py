"""Folders go to transformers and back without a change, and what cannot be read or held is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import compose, randomized
from reference import mtp_of, reference_of, theirs_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from zoo import hf
from zoo.config import ModelConfig
from zoo.decoder import Decoder
from zoo.hf_config import render

SMALL: dict[str, dict[str, Any]] = {
    "llama3_tiny": {"d_model": 32, "n_layers": 2, "vocab_size": 64, "blocks__dense__mlp__d_ff": 48},
    "qwen3_tiny": {"d_model": 32, "n_layers": 2, "vocab_size": 64, "blocks__dense__mlp__d_ff": 48},
    "deepseek_v3_tiny": {"d_model": 32, "n_layers": 3, "vocab_size": 64, "blocks__dense__mlp__d_ff": 48},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str, **changes: object) -> ModelConfig:
    return compose(name, **SMALL[name] | changes)


def some_tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama3_tiny", {}),
    ("llama3_tiny", {"tied": True, "blocks__dense__attention__rope__scaling": None}),
    ("qwen3_tiny", {}),
    ("qwen3_tiny", {"tied": False}),
    ("deepseek_v3_tiny", {}),
    ("deepseek_v3_tiny", {"context": 163840, "n_mtp": 2, "blocks__moe__moe__d_shared": 128}),
    ("deepseek_v3_tiny", {"n_mtp": 0, "prefix": [], "blocks__moe__mla__q_rank": None, "tied": True}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_transformers_loads_what_we_save(tmp_path, name, changes, capfd):
    config = small(name, **changes)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out", bos=1, eos=2)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert "[transformers]" not in capfd.readouterr().err  # where it prints its warnings
    assert theirs.dtype is torch.float32
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    tokens = some_tokens(config)
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_we_load_what_we_save(tmp_path, name, changes):
    config = small(name, **changes)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    again = hf.load(tmp_path / "out")
    assert again.config.n_mtp == config.n_mtp
    assert_same_state(again, ours)
    tokens = some_tokens(config)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not any(buffer.is_meta for buffer in again.buffers())


@pytest.mark.parametrize(("name", "changes"), [case for case in CASES if "n_mtp" not in case[1]])
def test_we_load_what_transformers_saves(tmp_path, name, changes):
    config = small(name, **changes | {"n_mtp": 0})
    ours = randomized(config, seed=0)
    reference_of(config, ours.state_dict()).save_pretrained(tmp_path)
    assert_same_state(hf.load(tmp_path), ours)


def test_modules_that_are_declared_and_not_stored_are_left_out_with_a_warning(tmp_path):
    config = small("deepseek_v3_tiny")
    reference_of(config, randomized(config, seed=0).state_dict()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="declares 1 multi-token modules and no file holds any"):
        assert hf.load(tmp_path).config.n_mtp == 0


def test_packed_experts_are_read_as_separate_ones_are(tmp_path):
    config = small("deepseek_v3_tiny", n_mtp=0)
    ours = randomized(config, seed=0)
    save_file({key: t.contiguous() for key, t in theirs_of(config, ours.state_dict()).items()}, tmp_path / hf_file())
    (tmp_path / "config.json").write_text(json.dumps(render(config)))
    assert_same_state(hf.load(tmp_path), ours)


def test_many_shards_hold_the_same_as_one(tmp_path):
    config = small("deepseek_v3_tiny")
    ours = randomized(config, seed=0)
    state = ours.state_dict()
    hf.write(config, state.__getitem__, folder=tmp_path / "out", shard_bytes=50_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 80_000  # with headers
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {key: t for file in files if not file.name.startswith("mtp") for key, t in load_file(file).items()}
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert_same_state(hf.load(tmp_path / "out"), ours)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(
        logits(theirs, some_tokens(config)), logits(ours, some_tokens(config)), rtol=1e-5, atol=1e-5
    )


def test_modules_of_a_model_as_deep_as_deepseek_v3_load_into_transformers(tmp_path):
    config = small("deepseek_v3_tiny", d_model=16, n_layers=61, blocks__moe__moe__n_experts=8)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    main, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    mtp = MtpModel.from_pretrained(main)
    want = mtp_of(main, config, ours.state_dict()).state_dict()
    got = mtp.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert_same_state(hf.load(tmp_path / "out"), ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None])
def test_a_dtype_is_taken_or_kept_and_router_biases_stay_wide(tmp_path, dtype):
    ours = randomized(small("deepseek_v3_tiny"), seed=0)
    hf.save(ours.to(torch.bfloat16) if dtype is None else ours, tmp_path / "out")
    again = hf.load(tmp_path / "out", dtype=dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype or torch.bfloat16}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert {buffer.dtype for buffer in again.buffers()} == {wide}


def test_router_biases_that_are_stored_wider_stay_so(tmp_path):
    ours = randomized(small("deepseek_v3_tiny"), seed=0).double()
    for name, buffer in ours.named_buffers():
        if name.endswith("balance_bias"):
            buffer += 1e-12  # lost in fp32
    hf.save(ours, tmp_path / "out")
    assert_same_state(hf.load(tmp_path / "out"), ours)
    assert {buffer.dtype for buffer in hf.load(tmp_path / "out", dtype=torch.bfloat16).buffers()} == {torch.float32}


def test_bf16_is_loaded_as_bf16_by_transformers(tmp_path):
    config = small("llama3_tiny")
    hf.save(randomized(config, seed=0).to(torch.bfloat16), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_tokenizer_files_are_carried_along(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    hf.save(randomized(small("llama3_tiny"), seed=0), tmp_path / "out", tokenizer=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["bos_token_id"] is None and raw["eos_token_id"] is None


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, file: str = "") -> None:
    stored = load_file(folder / (file or hf_file()))
    change(stored)
    save_file(stored, folder / (file or hf_file()))


def hf_file() -> str:
    return "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight of shape (32,)"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "lacks model.layers.1.mlp.experts.3.up_proj"),
        (lambda t: t.update(surprise=torch.ones(1)), "holds surprise, of which config.json says nothing"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 4)}), "lm_head.weight has shape (3, 4): must be (64, 32)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
            "model.norm.weight is F8_E4M3: must be one of",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "model.norm.weight is I8"),
    ],
)
def test_a_tensor_that_is_missing_superfluous_or_misshapen_is_named(tmp_path, change, message):
    hf.save(randomized(small("deepseek_v3_tiny"), seed=0), tmp_path / "out")
    change_tensors(tmp_path / "out", change)
    with pytest.raises(hf.HFError) as caught:
        hf.load(tmp_path / "out")
    assert message in str(caught.value)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_copies_of_embedding_and_head_may_be_absent_but_not_different(tmp_path):
    ours = randomized(small("deepseek_v3_tiny"), seed=0)
    hf.save(ours, tmp_path / "out")
    change_tensors(tmp_path / "out", lambda t: t["model.layers.3.embed_tokens.weight"].neg_(), file="mtp.safetensors")
    with pytest.raises(hf.HFError, match="layers.3.embed_tokens.weight must be equal to model.embed_tokens.weight"):
        hf.load(tmp_path / "out")

    def drop(stored: dict[str, torch.Tensor]) -> None:
        del stored["model.layers.3.embed_tokens.weight"], stored["model.layers.3.shared_head.head.weight"]

    change_tensors(tmp_path / "out", drop, file="mtp.safetensors")
    assert_same_state(hf.load(tmp_path / "out"), ours)


def test_a_tied_folder_may_repeat_its_head(tmp_path):
    ours = randomized(small("qwen3_tiny"), seed=0)
    hf.save(ours, tmp_path / "out")
    head = ours.state_dict()["embed.weight"].clone()
    change_tensors(tmp_path / "out", lambda t: t.update({"lm_head.weight": head}))
    assert_same_state(hf.load(tmp_path / "out"), ours)
    change_tensors(tmp_path / "out", lambda t: t.update({"lm_head.weight": head + 1}))
    with pytest.raises(hf.HFError, match="lm_head.weight must be equal to model.embed_tokens.weight"):
        hf.load(tmp_path / "out")


def test_a_file_that_is_missing_cut_or_not_safetensors_is_named(tmp_path):
    config = small("llama3_tiny")
    with pytest.raises(hf.HFError, match="config.json: no such file"):
        hf.load(tmp_path)
    state = randomized(config, seed=0).state_dict()
    hf.write(config, state.__getitem__, folder=tmp_path / "out", shard_bytes=20_000)
    second = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    for content in (whole[:-5], b"", b"no tensors in here"):
        second.write_bytes(content)
        with pytest.raises(hf.HFError, match=f"{second.name}: is no whole safetensors file"):
            hf.load(tmp_path / "out")
    second.unlink()
    with pytest.raises(hf.HFError, match=f"{second.name}: no such file"):
        hf.load(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(hf.HFError, match="config.json: cannot be read"):
        hf.load(tmp_path / "out")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    config = small("llama3_tiny")
    state = randomized(config, seed=0).state_dict()

    def full_disk(name: str) -> torch.Tensor:
        if name == "norm.weight":
            raise OSError(28, "No space left on device")
        return state[name]

    with pytest.raises(hf.HFError, match="out: cannot be written: .*No space left on device"):
        hf.write(config, full_disk, folder=tmp_path / "out", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_replaced_only_on_request(tmp_path):
    config = small("llama3_tiny")
    first, second = randomized(config, seed=1), randomized(config, seed=2)
    hf.save(first, tmp_path / "out")
    with pytest.raises(hf.HFError, match="out: exists: must be a new or empty folder"):
        hf.save(second, tmp_path / "out")
    assert_same_state(hf.load(tmp_path / "out"), first)
    hf.save(second, tmp_path / "out", replace=True)
    assert_same_state(hf.load(tmp_path / "out"), second)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(hf.HFError, match="has no config.json"):
        hf.save(second, tmp_path / "precious", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


def assert_same_state(one: Decoder, other: Decoder) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
