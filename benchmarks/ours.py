"""A training run of this project as a plain configuration, with nothing due while the clock runs."""

from typing import Any

from src.cli import CONF

FOREVER = 10**9


def configuration(*overrides: str, due: int = FOREVER) -> dict[str, Any]:
    """What `python -m src.train <overrides>` composes.

    Args:
        due: the step at which validation, checkpoints, samples and the end come.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    late = (
        *("name=benchmark", "overrides=[]", "choices={}"),  # what the command line would fill in
        f"trainer.max_steps={due}",
        f"trainer.val_every_n_steps={due}",
        f"callbacks.checkpoint.every_n_steps={due}",
        f"callbacks.samples.every_n_steps={due}",
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", [*overrides, *late]), resolve=True)
    return config
