"""What a training step costs: time and memory of the methods, each in fresh processes."""
