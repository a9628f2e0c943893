"""Measure the receptive field of a model by its name."""
