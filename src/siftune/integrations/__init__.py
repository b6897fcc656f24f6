"""Integration with Lightning, which has a trainer of its own; only its file imports the tool.

docs/tools.md shows its use, and that of tools that need no integration.
"""
