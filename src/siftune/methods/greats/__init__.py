"""GREATS: one choice of rows for all layers, those that most help a support set."""
