"""Runs that no training made: a configuration and random weights."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from src.cli import CONF
from src.interop.convert import write
from src.runs import build_net

TINY = ("experiment=smoke", "model.base_channels=16", "model.attention_resolutions=[]", "model.norm_groups=4")


def made(folder: Path, *overrides: str) -> Path:
    """The folder of a run with all of its weights random; zeros would hide what lies behind them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    config = OmegaConf.to_container(own, resolve=True)
    config["overrides"] = list(overrides)
    torch.manual_seed(0)
    net = build_net(config)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    write(config, net.state_dict(), folder)
    return folder
