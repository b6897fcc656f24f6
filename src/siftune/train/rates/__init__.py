"""Learning-rate sweeps."""
