"""The papers' evaluation protocols: rows, learning rates, runs, answers, and the results beside the papers' figures.

`protocol.py` looks a protocol up by name, `tasks.py` and `harness.py` phrase the questions, `rows.py` and
`harness_rows.py` prepare files, `cells.py` and `offsite.py` train and evaluate, and `table.py` prints. Training,
evaluation and sweeps are those of the package.
"""
