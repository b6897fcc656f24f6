"""Entries for tools that have a trainer of their own, a file for each; only that file imports the tool.

docs/tools.md has the lines for each, and for the tools that need no entry.
"""
