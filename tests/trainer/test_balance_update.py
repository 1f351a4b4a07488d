"""Gradients of whole updates with balance losses, against one plain graph over the whole global batch, in float64."""

from typing import Any

import pytest
import torch
from sharing import ALONE, LENGTH, ROWS, Case, mine, rows, shrunk

from trainer.engine import count
from zoo.decoder import Objective
from zoo.router import Router

E, K, GROUPS, OPEN, MICRO = 8, 3, 4, 2, 2
KINDS: dict[str, dict[str, Any]] = {
    "sequence": {"balance_loss": 0.3},
    "micro": {"switch_loss": {"weight": 0.3, "scope": "micro_batch"}},
    "global": {"switch_loss": {"weight": 0.3, "scope": "global_batch"}},
    "devices": {"device_loss": {"expert": 0.1, "device": 0.2, "communication": 0.3}},
    "z": {"z_loss": 0.3},
}
KINDS["all"] = {key: value for kind in ("sequence", "global", "devices", "z") for key, value in KINDS[kind].items()}


def model(kind):
    router = {"balance_rate": 0.01, "balance_loss": 0, "n_groups": GROUPS, "top_groups": OPEN} | KINDS[kind]
    mla = {"n_heads": 4, "q_rank": 10, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
    moe = {"n_experts": E, "top_k": K, "d_expert": 8, "d_shared": 12}
    moe |= {f"router__{key}": value for key, value in router.items()}
    return shrunk("deepseek_v3_tiny", {"mla": mla, "mlp": {"d_ff": 24}, "moe": moe}, n_mtp=1)


def product(chosen, shares, n_tokens):
    """Σ f P of some tokens, as the papers write it."""
    f = [E / (K * n_tokens) * sum(i in token for token in chosen) for i in range(E)]
    return sum(f[i] * shares[:, i].mean() for i in range(E))


def plain(kind, routing):
    """One layer's losses: balance and z; ``routing`` is of all tokens of the global batch, row after row."""
    on, n = KINDS[kind], ROWS * LENGTH
    shares = routing.scores / routing.scores.sum(dim=1, keepdim=True)
    best, chosen = routing.scores.topk(K).indices.tolist(), routing.chosen.tolist()
    each = [slice(row * LENGTH, (row + 1) * LENGTH) for row in range(ROWS)]
    micro = [slice(row * LENGTH, (row + MICRO) * LENGTH) for row in range(0, ROWS, MICRO)]
    balance = torch.zeros((), dtype=torch.float64)
    if "balance_loss" in on:
        balance += on["balance_loss"] * sum(product(best[s], shares[s], LENGTH) for s in each) / ROWS
    if "switch_loss" in on:
        parts = micro if on["switch_loss"]["scope"] == "micro_batch" else [slice(0, n)]
        size = n // len(parts)
        balance += on["switch_loss"]["weight"] * sum(product(chosen[s], shares[s], size) for s in parts) / len(parts)
    for s in each if "device_loss" in on else ():
        weights, mean = on["device_loss"], shares[s].mean(dim=0)
        balance += weights["expert"] * product(chosen[s], shares[s], LENGTH) / ROWS
        for device in range(GROUPS):
            mine = range(device * E // GROUPS, (device + 1) * E // GROUPS)
            p = sum(mean[i] for i in mine)
            f = sum(E / (K * LENGTH) * sum(i in token for token in chosen[s]) for i in mine) / len(mine)
            sent = GROUPS / (OPEN * LENGTH) * sum(any(i in mine for i in token) for token in chosen[s])
            balance += (weights["device"] * f + weights["communication"] * sent) * p / ROWS
    z = on.get("z_loss", 0.0) * sum(token.exp().sum().log() ** 2 for token in routing.logits) / n
    return balance, z


def whole_batch(case, kind, step):
    """Both losses and all gradients of one graph over all rows."""
    found, batch = [], rows(step, case.config.n_mtp)
    hooks = [
        module.register_forward_hook(lambda module, inputs, routing: found.append(routing))
        for module in case.model.modules()
        if isinstance(module, Router)
    ]
    objective = Objective(batch.targets, batch.mtp_tokens, batch.mtp_targets, None, case.engine.loss)
    losses = case.model(batch.tokens, positions=batch.positions, documents=batch.documents, objective=objective)
    for hook in hooks:
        hook.remove()
    targets = torch.stack([(batch.targets >= 0).sum(), (batch.mtp_targets >= 0).sum()])
    terms = [plain(kind, routing) for routing in found]
    balance, z = (sum(each) for each in zip(*terms, strict=True))
    total = (losses / targets * case.engine.weights).sum() + balance + z
    parameters = dict(case.model.named_parameters())
    grads = torch.autograd.grad(total, [*parameters.values()])
    return balance.item(), torch.as_tensor(z).item(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_in_micro_batches_has_the_gradients_of_plain_losses_over_the_whole_batch(kind):

    case = Case(model(kind), ALONE, micro=MICRO)
    want_balance, want_z, want = whole_batch(case, kind, 0)
    for router in case.model.routers().values():
        for counted in (router.load, router.balance_value, router.z_value):
            counted.zero_()
    batches = mine(rows(0, case.config.n_mtp), case.mesh, MICRO)
    assert len(batches) == ROWS // MICRO
    terms = case.engine.forward_backward(batches, count(batches, case.mesh))
    assert terms.balance.item() == pytest.approx(want_balance, rel=1e-12)
    assert terms.router_z.item() == pytest.approx(want_z, rel=1e-12)
    assert (want_balance > 0) == (kind != "z") and (want_z > 0) == (kind in ("z", "all"))
    for name, parameter in case.model.named_parameters():
        gap, size = (parameter.grad - want[name]).abs().max(), want[name].abs().max()
        assert gap <= 1e-9 * size + 1e-13, (name, gap, size)
