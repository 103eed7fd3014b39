"""What a run leaves beside its weights, and how it is started."""
