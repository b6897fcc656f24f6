"""Bad answers in a pool: scores that detect their fault, and training without the rows that they name."""
