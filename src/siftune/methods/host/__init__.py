"""Integration with a host Trainer: callbacks, ranks, logs."""
