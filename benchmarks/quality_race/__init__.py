"""Quality at equal time: python -m benchmarks.quality_race, see __main__.py."""
