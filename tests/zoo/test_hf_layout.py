"""Stored tensors are made of ours, and ours found in them again."""

import pytest
import torch
from torch import Tensor

from zoo.hf_layout import Layout, fused, stacked


def rows(*names: str) -> Tensor:
    """A column of numbers that read like names: a1 is 10.1, b0 is 11.0."""
    return torch.tensor([[ord(name[0]) - 87 + int(name[1]) / 10] for name in names])


def round_trip(layout: Layout, parts: dict[str, Tensor]) -> Tensor:
    stored = layout.assemble(parts.__getitem__)
    assert stored.shape == layout.shape
    for name, part in parts.items():
        assert torch.equal(layout.extract(stored, name), part)
    return stored


def test_parts_lie_one_after_the_other_or_take_turns():
    parts = {"a": rows("a0", "a1"), "b": rows("b0", "b1")}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert torch.equal(round_trip(fused("k", shapes), parts), rows("a0", "a1", "b0", "b1"))
    assert torch.equal(round_trip(fused("k", shapes, groups=2), parts), rows("a0", "b0", "a1", "b1"))
    assert torch.equal(round_trip(fused("k", shapes, transposed=True), parts), rows("a0", "a1", "b0", "b1").T)


def test_parts_may_have_unequal_shares_of_each_group():
    parts = {"a": rows("a0", "a1"), "b": rows("b0", "b1", "b2", "b3")}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    want = rows("a0", "b0", "b1", "a1", "b2", "b3")
    assert torch.equal(round_trip(fused("k", shapes, groups=2), parts), want)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_banks_are_packed_along_their_rows_and_read_in_pieces(groups, transposed):
    parts = {name: torch.randn(3, 5, 4) for name in ("gate", "up")}
    layout = fused("k", dict.fromkeys(parts, (3, 5, 4)), dim=1, groups=groups, transposed=transposed)
    stored = round_trip(layout, parts)
    assert stored.shape == ((3, 4, 10) if transposed else (3, 10, 4))
    apart = torch.cat([layout.extract(stored[e : e + 1], "up") for e in range(3)])
    assert torch.equal(apart, parts["up"])
    columns = stored if transposed else stored.transpose(1, 2)
    first = columns[..., 0::2] if groups == 5 else columns[..., :5]
    assert torch.equal(first.transpose(1, 2), parts["gate"])


def test_biases_are_packed_too():
    parts = {"gate": torch.randn(3, 5), "up": torch.randn(3, 5)}
    stored = round_trip(fused("k", dict.fromkeys(parts, (3, 5)), dim=1, groups=5), parts)
    assert torch.equal(stored[:, 0::2], parts["gate"])


def test_a_vector_has_nothing_to_transpose():
    parts = {"q": torch.randn(4), "k": torch.randn(2)}
    layout = fused("k", {"q": (4,), "k": (2,)}, transposed=True)
    assert torch.equal(round_trip(layout, parts), torch.cat([parts["q"], parts["k"]]))


def test_kernels_of_a_convolution_have_a_channel_between():
    parts = {"q": torch.randn(4, 3), "v": torch.randn(8, 3)}
    layout = fused("k", {"q": (4, 3), "v": (8, 3)}, unit=True)
    assert round_trip(layout, parts).shape == (12, 1, 3)


def test_experts_are_stored_one_by_one():
    bank = torch.randn(3, 5, 4)
    layouts = stacked(["x", "y", "z"], "bank", (3, 5, 4))
    assert [layout.key for layout in layouts] == ["x", "y", "z"]
    assert torch.equal(torch.stack([layout.assemble({"bank": bank}.__getitem__) for layout in layouts]), bank)


def test_a_part_that_is_read_owns_no_more_memory_than_its_own():
    layout = fused("k", {"a": (2, 4), "b": (2, 4)})
    part = layout.extract(torch.randn(4, 4), "a")
    assert part.untyped_storage().nbytes() == part.nbytes
