"""Sifting: the part of a pool that is like a few rows of the target task."""
