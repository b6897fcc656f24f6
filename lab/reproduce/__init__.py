"""Commonsense suite of LLM-Adapters (arXiv 2304.01933), on which the papers on IST and GAST measure, for other models.

`questions.py` prepares the files, `runs.py` trains and evaluates, `answers.py` reads the answers, and `table.py`
prints them. Training, evaluation and sweeps are those of the package. `commonsense.yaml` is the recipe.
"""
