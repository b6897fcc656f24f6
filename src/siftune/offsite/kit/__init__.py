"""Kits on disk: what a model's owner hands out, written in one move and read with suspicion."""
