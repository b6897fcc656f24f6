"""Rows: read from files and the hub, checked, and turned into tokens."""
