"""The exchange: emulate, load, tune, return, plug."""
