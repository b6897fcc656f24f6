"""Bad answers in a pool, and training without the rows that are like them."""
