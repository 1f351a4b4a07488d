"""How near two implementations must be in fp32: ``from parity import assert_near, gradients``."""

from collections.abc import Mapping

from torch import Tensor, nn


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, share: float = 1.0) -> None:
    """Each tensor is within tolerance, or a share of it."""
    far = {name: used for name, used in shares(got, want).items() if not used <= share}
    assert not far, f"times the tolerance: {far}"


def shares(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of its tolerance each tensor uses, which is 1e-5 of its largest value and 1e-6 of the largest of all.

    The second term is there because some gradients are zero in theory.
    """
    assert got.keys() == want.keys(), f"{got.keys() ^ want.keys()}"
    largest = max(tensor.abs().max().item() for tensor in want.values())
    return {
        name: (got[name] - tensor).abs().max().item() / (1e-5 * tensor.abs().max().item() + 1e-6 * largest)
        for name, tensor in want.items()
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter; without those of parameters that took no part."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
