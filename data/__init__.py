"""Token shards, prepared once and read by window: the same global batch on every plan. Imports no other room."""
