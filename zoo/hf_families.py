"""All families that transformers 5.23 has classes for."""

from zoo import hf_dense, hf_sparse

FAMILIES = [*hf_dense.ROWS, *hf_sparse.ROWS]
BY_NAME = {family.name: family for family in FAMILIES}
BY_TYPE = {family.model_type: family for family in FAMILIES}
