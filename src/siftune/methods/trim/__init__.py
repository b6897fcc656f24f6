"""Trim: the rows of a batch with the smallest loss, or the largest, or any."""
