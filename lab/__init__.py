"""The laboratory: the experiments behind the documented figures. Run each from a clone: `python -m lab.NAME`."""
