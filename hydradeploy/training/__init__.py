"""The trainer and its recipes. Everything here needs torch."""
