"""Static: the same layers in every step."""
