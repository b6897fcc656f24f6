"""Integrations with tools that have a trainer of their own, a file for each; only that file imports the tool.

docs/tools.md shows their use, and that of tools that need no integration.
"""
