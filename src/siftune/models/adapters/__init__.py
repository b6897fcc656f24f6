"""Adapter types and their registry."""
