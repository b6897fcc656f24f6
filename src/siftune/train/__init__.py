"""Trainer callbacks, data, and siftune's own training path."""
