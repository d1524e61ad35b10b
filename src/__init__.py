"""A lab for image diffusion models; see README.md."""
