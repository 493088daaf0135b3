"""Accuracy of artifacts on labelled images; needs no torch."""
