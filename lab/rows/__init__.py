"""Suspect rows of pools whose wrong rows are known; run by `run.py`, tables by `report.py`."""
