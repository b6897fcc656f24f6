"""Forgetting: the task against held-out text and other tasks, with and without a KL penalty to the base."""
