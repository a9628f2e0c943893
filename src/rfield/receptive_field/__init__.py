"""Receptive fields: theoretical, per layer, effective."""
