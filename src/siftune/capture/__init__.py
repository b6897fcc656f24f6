"""Gates on the decoder layers: who trains in this step."""
