"""Recipes: schema, reading, validation."""
