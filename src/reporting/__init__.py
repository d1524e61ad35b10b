"""Runs that are over, or not yet: read from their folders, compared in numbers, and shown on one page."""
