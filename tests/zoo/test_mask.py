import torch

from zoo.mask import Mask


def test_documents_see_themselves_and_the_past():
    mask = Mask(torch.tensor([[0, 0, 1, 1, 1]])).dense
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[0, 0].int().tolist() == want


def test_a_single_document_needs_no_mask():
    assert Mask(None).dense is None
