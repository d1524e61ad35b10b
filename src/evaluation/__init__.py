"""Samples from trained models, and what they are worth."""
