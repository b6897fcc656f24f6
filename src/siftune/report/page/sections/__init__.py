"""The parts of a report, a module each; none knows how it is laid out."""
