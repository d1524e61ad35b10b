"""Weights of others in, and ours out: for each peer one table of names, read in both directions."""
