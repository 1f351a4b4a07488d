"""Values of runs as YAML, and their schema."""
