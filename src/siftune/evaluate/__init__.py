"""Multiple choice, exact match, perplexity, and their intervals."""
