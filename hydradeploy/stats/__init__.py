"""Statistics. Only `logits` needs numpy, so that picking starts without it."""
