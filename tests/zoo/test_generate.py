import torch
from models import compose, randomized

from zoo.generate import generate

CPU = torch.device("cpu")


def test_greedy_text_takes_the_likeliest_token_each_time():
    model = randomized(compose("llama3_tiny"), seed=0)
    added = generate(model, prompt=[5, 7], n_tokens=4, device=CPU)
    tokens = [5, 7]
    for token in added:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
        tokens.append(token)
    assert model.training


def test_draws_depend_on_the_seed_alone():
    model = randomized(compose("llama3_tiny"), seed=0)
    first, again, other = (
        generate(model, prompt=[5], n_tokens=8, device=CPU, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
