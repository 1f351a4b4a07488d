"""Modules of multi-token prediction equal those of transformers: losses, and the gradient of every parameter.

Transformers has such modules for DeepSeek-V3 and GLM-4.5. For Qwen3-Next, whose it leaves out, they are put together
here from its own layers, as vllm/model_executor/models/qwen3_next_mtp.py does.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws_moe import MOE
from models import randomized
from parity import assert_near, gradients
from reference import mtp_of, mtp_ours_of, mtp_theirs_of, ours_of, reference_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.config import ModelConfig
from zoo.decoder import Objective


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def summed(states: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    assert softcap is None
    return F.cross_entropy(F.linear(states, weight), targets, ignore_index=-100, reduction="sum")


def ahead(tokens: Tensor, places: int, *, missing: int) -> Tensor:
    """Tokens some places further on. Example: 7 8 9, one place: 8 9 missing."""
    return F.pad(tokens[:, places:], (0, places), value=missing)


def drawn(family: str, *, depths: int, seed: int) -> tuple[ModelConfig, Tensor]:
    """A tiny model with modules of multi-token prediction, and tokens (2, 33)."""
    config = dataclasses.replace(MOE[family](seed), n_mtp=depths)
    if family == "qwen3_next":
        config = dataclasses.replace(config, n_layers=4)  # so that the last has attention, as in the published model
    return config, torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))


def objective_of(tokens: Tensor, *, depths: int) -> Objective:
    return Objective(
        targets=ahead(tokens, 1, missing=-100),
        mtp_tokens=torch.stack([ahead(tokens, k, missing=0) for k in range(1, depths + 1)], dim=1),
        mtp_targets=torch.stack([ahead(tokens, k + 1, missing=-100) for k in range(1, depths + 1)], dim=1),
        rows=None,
        loss=summed,
    )


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm45", "glm45_air"])
def test_multi_token_losses_and_gradients_equal_those_of_transformers(family, depths):
    config, tokens = drawn(family, depths=depths, seed=depths)
    ours = randomized(config, seed=depths)
    main = reference_of(config, ours.state_dict())
    mtp = mtp_of(main, config, ours.state_dict())
    objective = objective_of(tokens, depths=depths)
    got = ours(tokens, objective=objective)

    positions = torch.arange(tokens.shape[1])[None]
    state = main.model(tokens).last_hidden_state
    want = [summed(state.flatten(0, 1), main.lm_head.weight, objective.targets.flatten())]
    for depth in range(depths):
        state = mtp.forward_layer(depth, state, positions, None, input_ids=objective.mtp_tokens[:, depth])
        want.append(summed(state.flatten(0, 1), main.lm_head.weight, objective.mtp_targets[:, depth].flatten()))
    assert_near({"losses": got.detach()}, {"losses": torch.stack(want).detach()})

    got.sum().backward()
    torch.stack(want).sum().backward()
    assert_near(gradients(ours), ours_of(config, gradients(main)) | mtp_ours_of(config, gradients(mtp)))


class QwenMTP(nn.Module):
    """Qwen3-Next's module, its parts named as checkpoints name them after ``mtp.``."""

    def __init__(self, main: PreTrainedModel) -> None:
        super().__init__()
        config, last = main.config, main.model.layers[-1]
        norm_class: Any = type(main.model.norm)
        new_norm = functools.partial(norm_class, config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_embedding = new_norm()
        self.pre_fc_norm_hidden = new_norm()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([type(last)(config, len(main.model.layers) - 1)])
        self.norm = new_norm()

    def forward(self, embedded: Tensor, state: Tensor, main: PreTrainedModel) -> Tensor:
        """(B, T, D) and (B, T, D) to (B, T, D)."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(state)], dim=-1))
        length = x.shape[1]
        turns = main.model.rotary_emb(x, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        return self.norm(self.layers[0](x, position_embeddings=turns, attention_mask=mask))


@pytest.mark.parametrize("seed", [1, 2])
def test_multi_token_losses_and_gradients_of_qwen3_next_equal_its_parts_put_together(seed):
    config, tokens = drawn("qwen3_next", depths=1, seed=seed)
    ours = randomized(config, seed=seed)
    main = reference_of(config, ours.state_dict())
    mtp = QwenMTP(main)
    mtp.load_state_dict({name.removeprefix("mtp."): t for name, t in mtp_theirs_of(config, ours.state_dict()).items()})
    objective = objective_of(tokens, depths=1)
    got = ours(tokens, objective=objective)

    state = main.model(tokens).last_hidden_state
    ahead_one = mtp(main.model.embed_tokens(objective.mtp_tokens[:, 0]), state, main)
    want = [summed(state.flatten(0, 1), main.lm_head.weight, objective.targets.flatten())]
    want.append(summed(ahead_one.flatten(0, 1), main.lm_head.weight, objective.mtp_targets[:, 0].flatten()))
    assert_near({"losses": got.detach()}, {"losses": torch.stack(want).detach()})

    got.sum().backward()
    torch.stack(want).sum().backward()
    theirs = gradients(main) | {f"mtp.{name}": gradient for name, gradient in gradients(mtp).items()}
    assert_near(gradients(ours), ours_of(config, theirs))
