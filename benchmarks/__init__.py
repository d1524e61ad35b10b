"""Side by side with peers, in one run: python -m benchmarks.<name> from the repository's root."""
