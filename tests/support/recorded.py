"""A run that records its rows while GAST chooses among them, on one rank or several."""

from support.trainers import adapted, rows, train

from siftune import GAST, RowRecord


def recorded(folder, accumulate):
    """Train four steps of sixteen rows; numbers of the rows in every batch, and the Trainer."""
    gast = GAST(select=2, support="rest", keep=True)
    settings = {
        "max_steps": 4, "lr_scheduler_type": "constant", "ddp_find_unused_parameters": False,
        "gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    _, trainer = train(folder, RowRecord(), gast, model=adapted(), dataset=rows(64), **settings)
    return [choice.rows for choice in gast.history], trainer
