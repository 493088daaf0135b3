"""The supernet and its checkpoints. Everything here needs torch."""
