"""Measurements against other implementations; each file one subject, results in ``results/`` with command and commit."""
