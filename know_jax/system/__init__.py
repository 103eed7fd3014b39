"""The machine and its processes: what any program needs, and none of the method."""
