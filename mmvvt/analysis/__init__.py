"""Measurements and pictures of a model."""
