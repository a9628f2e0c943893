"""Learned layers put into a model that exists, and taken out again."""
