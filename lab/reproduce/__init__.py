"""The papers' evaluation protocols, end to end: rows, learning rates, runs, answers, and the table beside the paper's.

`protocol.py` knows them by name, `tasks.py` their questions, `rows.py` prepares files, `cells.py` trains and asks, and
`table.py` prints; `shape.py` tells what a run would take without the model. Nothing here trains, measures or sweeps by
itself: it has `trainer`, `evaluate` and `trainer.lr_sweep` do so.
"""
