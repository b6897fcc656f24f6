"""When does selection pay? Scenarios, methods and their rivals, run by `run.py` and compared by `report.py`."""
