"""The meta-dataset of forgetting runs, and the training of KNOWN on it."""
