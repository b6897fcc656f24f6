"""The siftune command."""
