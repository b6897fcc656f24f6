"""Decoder layers, adapters, losses, and loading of models."""
