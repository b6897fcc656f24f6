"""Run folders: layout, checkpoints, selections, model card."""
