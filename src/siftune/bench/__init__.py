"""Time and memory of training steps, each method in a fresh process."""
