"""Quality of selection: scenarios, methods and alternatives, run by `run.py` and compared by `report.py`."""
