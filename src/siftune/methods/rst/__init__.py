"""RST: the layers that train in a step, drawn at random."""
