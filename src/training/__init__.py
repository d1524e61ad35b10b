"""Training on PyTorch Lightning: the module, EMA, checkpoints, loggers, and what happens while it runs."""
