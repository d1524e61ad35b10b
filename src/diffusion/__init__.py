"""The mathematics of diffusion, on torch alone.

A noise level is a pair (alpha, sigma): x_t = alpha x0 + sigma eps. Schedules know what time is; everything after them
sees levels.
"""
