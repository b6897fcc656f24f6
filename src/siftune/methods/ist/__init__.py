"""IST: the layers that train in a step, drawn by their importance."""
