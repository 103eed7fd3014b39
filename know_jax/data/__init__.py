"""Data sets, their augmentation on the device, and nested subsets."""
