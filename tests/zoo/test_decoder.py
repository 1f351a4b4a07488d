import pytest
import torch
from models import compose, randomized

from zoo.decoder import Embedding


def test_the_embedding_of_a_frequent_token_keeps_its_gradient_in_bf16():
    torch.manual_seed(0)
    embedding = Embedding(vocab_size=8, d_model=16)
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
    pull = torch.randn(1, 4096, 16).bfloat16() * 0.1 + 0.01
    for dtype in (torch.float32, torch.bfloat16):
        embedding.weight = torch.nn.Parameter(torch.randn(8, 16, dtype=dtype))
        (embedding(tokens).bfloat16() * pull).sum().backward()
        want = pull.double().sum(dim=(0, 1))
        error = (embedding.weight.grad[0].double() - want).norm() / want.norm()
        assert error < 5e-3, (dtype, error)  # the result itself is rounded to bf16


def test_published_layers_follow_prefix_and_cycle():
    config = compose("deepseek_v3_671b")
    assert config.kinds == ["dense"] * 3 + ["moe"] * 58


def test_depths_that_are_not_asked_for_are_not_run():
    from zoo.decoder import Objective

    model = randomized(compose("deepseek_v3_tiny", d_model=32, n_layers=2, n_mtp=2), seed=0)
    tokens = torch.randint(0, 4096, (2, 9))
    ahead = tokens[:, None].expand(2, 2, 9)

    def loss(h, weight, targets, *, softcap):
        assert softcap is None
        return torch.nn.functional.cross_entropy(h @ weight.t(), targets, reduction="sum")

    every = model(tokens, objective=Objective(tokens, ahead, ahead, None, loss))
    first = model(tokens, objective=Objective(tokens, ahead[:, :1], ahead[:, :1], None, loss))
    none = model(tokens, objective=Objective(tokens, ahead[:, :0], ahead[:, :0], None, loss))
    assert every.shape == (3,)
    assert torch.equal(every[:2], first) and torch.equal(every[:1], none)


def test_more_tokens_than_learned_positions_are_refused_in_one_line():
    model = randomized(compose("gpt2_tiny", context=8), seed=0)
    tokens = torch.randint(0, 256, (2, 9))
    assert model(tokens[:, :8]).shape[1] == 8
    with pytest.raises(ValueError, match=r"^tokens of length 9: must be at most model.context \(8\), which has .*$"):
        model(tokens)
    places = torch.arange(9).remainder(5).expand(2, 9)
    assert model(tokens, positions=places).shape[1] == 9  # whoever gives positions answers for them
    assert randomized(compose("llama3_tiny", context=8), seed=0)(tokens).shape[1] == 9
