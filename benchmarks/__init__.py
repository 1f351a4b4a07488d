"""Measurements beside other implementations; what they gave is in ``results/``."""
