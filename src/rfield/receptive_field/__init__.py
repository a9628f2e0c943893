"""Receptive fields of any module: theoretical, probed, per layer, effective; and advice."""
