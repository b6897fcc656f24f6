"""Find a model's decoder layers, attach adapters, load models."""
