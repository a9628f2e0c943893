"""Measuring what a network sees, by the name of a model."""
