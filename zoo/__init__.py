"""Architectures: one set of components, described by data.

Shape letters, used in every room:
    B rows of a batch, T tokens of a row, N tokens of a batch (B·T), D model width, H query heads, G key-value heads,
    K head width, F feed-forward width, E experts, S experts chosen for a token, V vocabulary.
"""
