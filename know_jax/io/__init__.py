"""Files: atomic and sealed ones, journals, checkpoints, and the formats of weights."""
