"""Spec and weights become graphs, one weights file per precision, and the proof that they compute the same."""
