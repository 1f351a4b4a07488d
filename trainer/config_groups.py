"""What parameters are to their model, so that optimizers can treat them apart."""

from enum import StrEnum


class Role(StrEnum):
    """What a parameter is to its model."""

    embedding = "embedding"  # the head too where they are one matrix
    head = "head"
    norm = "norm"
    bias = "bias"
    vector = "vector"  # a number for each head, or a gate of one row
    filter = "filter"  # a short convolution of each channel
    matrix = "matrix"  # or a bank of them, one an expert
