"""siftune's own training path: a recipe in, a run folder out."""
