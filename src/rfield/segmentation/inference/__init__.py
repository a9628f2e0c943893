"""Trained networks at work: labelling images and scoring data sets."""
