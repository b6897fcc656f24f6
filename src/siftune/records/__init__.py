"""Training rows of a recipe, and records of their losses."""
