"""Which score names wrong rows, and does it pay to leave them out? Run by `run.py`, compared by `report.py`."""
