"""A lab for image diffusion models; see README.md."""

from src import lean

lean.install()
