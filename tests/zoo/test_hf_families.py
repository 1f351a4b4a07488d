"""Every family goes to transformers' class and back without a change, in each spelling that files have."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from draws import DENSE
from draws_moe import MOE
from models import randomized
from reference import theirs_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from zoo import hf
from zoo.config import ModelConfig
from zoo.decoder import Decoder
from zoo.hf_config import render
from zoo.hf_families import BY_NAME

DRAWN = DENSE | MOE
THEIRS = [name for name in DRAWN if name != "grok2"]  # transformers has no class for it
MULTI_TOKEN = {"deepseek_v3", "glm45", "glm45_air", "qwen3_next"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(family: str, seed: int, *, mtp: bool = False) -> ModelConfig:
    config = DRAWN[family](seed)
    return dataclasses.replace(config, n_mtp=int(mtp and family in MULTI_TOKEN), tied=seed % 2 == 1)


def logits(model: nn.Module, config: ModelConfig) -> Tensor:
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, Tensor) else result.logits


def pretrained(folder: Path, config: ModelConfig) -> tuple[nn.Module, dict[str, Any]]:
    """What the family's Auto class loads, and what it says of missing and unexpected keys."""
    many = "AutoModelForImageTextToText" if config.family == "chameleon" else "AutoModelForCausalLM"
    kind = getattr(transformers, many)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}  # kernels want multiples of 16 bytes
    return kind.from_pretrained(folder, output_loading_info=True, **plain)


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def without_mtp(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", THEIRS)
def test_transformers_loads_what_we_save_and_we_what_transformers_saves(tmp_path, family, seed):
    config = drawn(family, seed, mtp=True)
    ours = randomized(config, seed=seed)
    hf.save(ours, tmp_path / "ours", bos=1, eos=2)
    assert_same_state(hf.load(tmp_path / "ours").state_dict(), ours.state_dict())

    theirs, report = pretrained(tmp_path / "ours", config)
    assert {key: value for key, value in report.items() if value} == {}
    want = logits(theirs, config)
    torch.testing.assert_close(logits(ours, config), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())

    theirs.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if "num_nextn_predict_layers" in raw:  # transformers declares modules that it does not save
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 0}))
    again = hf.load(tmp_path / "theirs")
    assert_same_state(again.state_dict(), without_mtp(ours))
    assert torch.equal(logits(again, config), logits(ours, config))


@pytest.mark.parametrize("family", THEIRS)
def test_tensors_as_transformers_has_them_in_memory_are_read_too(tmp_path, family):
    config = drawn(family, 0)
    ours = randomized(config, seed=0)
    packed = {key: tensor.contiguous() for key, tensor in theirs_of(config, ours.state_dict()).items()}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(render(config)))
    assert_same_state(hf.load(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("family", DRAWN)
def test_many_shards_hold_the_same_as_one(tmp_path, family):
    config = drawn(family, 0, mtp=True)
    state = randomized(config, seed=0).state_dict()
    fetched: list[str] = []

    def get(name: str) -> Tensor:
        fetched.append(name)
        return state[name]

    hf.write(config, get, folder=tmp_path / "out", shard_bytes=8_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert_same_state(hf.load(tmp_path / "out").state_dict(), state)
    repeated = {"embed.weight", "head.weight"}  # asked for its dtype, and stored again beside multi-token modules
    once = [name for name in fetched if name not in repeated]
    assert len(once) == len(set(once))


def test_a_family_without_a_class_has_our_own_layout(tmp_path):
    config = drawn("grok2", 0)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    again = hf.load(tmp_path / "out")
    assert_same_state(again.state_dict(), ours.state_dict())
    assert again.config == config
    assert torch.equal(logits(again, config), logits(ours, config))
    with pytest.raises(ValueError, match="zoo"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("zoo", "message"),
    [
        ({"family": "llama3"}, "zoo: family=llama3: must be one of ['grok2']"),
        ({"n_layers": "many"}, "zoo: Value 'many' of type 'str' could not be converted to Integer"),
        ({"surprise": 1}, "zoo: Key 'surprise' not in 'ModelConfig'"),
        ({"d_model": -1}, "zoo: model.d_model=-1: must be above 0"),
    ],
)
def test_our_own_layout_is_checked(tmp_path, zoo, message):
    raw = json.loads(json.dumps(render(drawn("grok2", 0))))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"zoo": raw["zoo"] | zoo}))
    with pytest.raises(hf.HFError) as caught:
        hf.read_config(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_gpt2_as_published_has_bare_names_and_masks(tmp_path):
    config = drawn("gpt2", 1)
    assert config.tied
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, tmp_path / "out" / "model.safetensors")
    assert_same_state(hf.load(tmp_path / "out").state_dict(), ours.state_dict())


def test_an_image_tokenizer_is_passed_over_and_written_as_zeros(tmp_path):
    config = drawn("chameleon", 0)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    images = {key: tensor for key, tensor in stored.items() if key.startswith("model.vqmodel.")}
    assert images and not any(tensor.any() for tensor in images.values())
    assert sum(tensor.nbytes for tensor in images.values()) < 2**18
    stored["model.vqmodel.encoder.conv_in.weight"] = torch.ones(128, 3, 3, 3)
    save_file(stored, tmp_path / "out" / "model.safetensors")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    raw["vocabulary_map"] = {"<image>": 3, "IMGIMGAZ": 4}
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    assert torch.equal(logits(hf.load(tmp_path / "out"), config), logits(ours, config))


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path):
    config = drawn("kimi_k2", 0)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k2"}))
    assert_same_state(hf.load(tmp_path / "out").state_dict(), ours.state_dict())


def test_multi_token_modules_of_qwen3_next_are_found_without_being_declared(tmp_path):
    for mtp in (False, True):
        ours = randomized(drawn("qwen3_next", 0, mtp=mtp), seed=0)
        folder = tmp_path / str(mtp)
        hf.save(ours, folder)
        raw = json.loads((folder / "config.json").read_text())
        del raw["num_nextn_predict_layers"]
        (folder / "config.json").write_text(json.dumps(raw))
        assert_same_state(hf.load(folder).state_dict(), ours.state_dict())


def test_multi_token_modules_of_glm_load_into_transformers(tmp_path):
    config = dataclasses.replace(drawn("glm45", 0, mtp=True), n_layers=46, d_model=16)
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    main, report = pretrained(tmp_path / "out", config)
    assert not any(report.values())
    got = MtpModel.from_pretrained(main).state_dict()
    assert torch.equal(got["layers.0.eh_proj.weight"], ours.state_dict()["mtp.0.proj.weight"])
    assert torch.equal(
        got["layers.0.mtp_block.self_attn.q_proj.weight"], ours.state_dict()["mtp.0.block.mixer.wq.weight"]
    )


@pytest.mark.parametrize("family", THEIRS)
def test_a_missing_an_extra_and_a_misshapen_tensor_of_any_family_are_named(tmp_path, family):
    config = drawn(family, 0, mtp=True)
    hf.save(randomized(config, seed=0), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    kept = [key for key in whole if not key.startswith("model.vqmodel.")]
    for key in kept[:: max(1, len(kept) // 6)]:
        save_file({other: tensor for other, tensor in whole.items() if other != key}, file)
        refused(tmp_path / "out", f"lacks {key} of shape {tuple(whole[key].shape)}")
        save_file(whole | {key: torch.ones(7, 5, 3, 2)}, file)
        refused(tmp_path / "out", f"{key} has shape (7, 5, 3, 2): must be {tuple(whole[key].shape)}")
    surprise = f"{BY_NAME[config.family].names.layer.format(0)}self_attn.surprise"
    save_file(whole | {surprise: torch.ones(1)}, file)
    refused(tmp_path / "out", f"holds {surprise}, of which config.json says nothing")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(hf.HFError) as caught:
        hf.load(folder)
    assert message in str(caught.value), str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_attention_survives_where_its_class_has_none_to_ask_for(tmp_path):
    config = drawn("qwen3_next", 0)
    linear = next(kind for kind in config.kinds if config.blocks[kind].deltanet is not None)
    config = dataclasses.replace(config, prefix=[], cycle=[linear])
    ours = randomized(config, seed=0)
    hf.save(ours, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not raw.keys() & {"num_attention_heads", "num_key_value_heads", "head_dim"}
    theirs, report = pretrained(tmp_path / "out", config)
    assert not any(report.values())
    torch.testing.assert_close(logits(ours, config), logits(theirs, config), rtol=1e-4, atol=1e-4)
    assert_same_state(hf.load(tmp_path / "out").state_dict(), ours.state_dict())
