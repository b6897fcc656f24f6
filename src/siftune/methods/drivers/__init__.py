"""Drivers that connect a method with the engine."""
