"""Foundations that import nothing else of siftune."""
