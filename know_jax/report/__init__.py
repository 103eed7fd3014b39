"""What reports are made of: intervals and pictures."""
