"""The per-sample engine: which layers take part in a backward pass, and the gradient of every row in it."""
