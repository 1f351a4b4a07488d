"""Starting processes; no torch, so that it runs on a login node."""
