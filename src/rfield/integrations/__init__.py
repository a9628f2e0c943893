"""Callbacks that learn receptive fields in the training loops of other libraries."""
