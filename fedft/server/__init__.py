"""One run: configuration, rounds, grids, checkpoints."""
