"""Scores that detect wrong rows, and training without those rows; run by `run.py`, compared by `report.py`."""
