"""The methods, a room for each: maths, settings and the callback that brings it into training."""
