"""Guards of a training run: non-finite steps, signals, memory."""
