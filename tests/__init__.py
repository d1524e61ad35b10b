"""Tests. This file makes the folder a package that comes before others' of the name: torch-fidelity installs one."""
