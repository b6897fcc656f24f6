"""Cut: all layers above a random depth train, and backward ends there."""
