"""Predicting weights: from memory, from files, from a forgetting run."""
