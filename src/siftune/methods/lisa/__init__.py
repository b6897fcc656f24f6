"""LISA: a few layers, drawn at random and held for some steps."""
