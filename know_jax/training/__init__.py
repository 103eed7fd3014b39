"""Training: state, steps and loop."""
