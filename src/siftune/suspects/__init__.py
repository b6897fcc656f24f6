"""Training rows that may be wrong."""
