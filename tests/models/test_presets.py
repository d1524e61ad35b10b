"""The presets of conf/model are the papers' networks: the exact number of parameters, counted without memory."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.build import build, check
from src.cli import CONF


def parameters(*overrides: str) -> int:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose("train", ["data=cifar10", *overrides]).model, resolve=True)
    check(node, "model")
    with torch.device("meta"):
        return sum(p.numel() for p in build(node, "model").parameters())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=unet_ho"], 35_746_307),
        (["model=unet_iddpm"], 52_546_438),
        # guided-diffusion has no "none" among its labels: 768 numbers less
        (["model=unet_adm", "data.image_size=64", "model.num_classes=1000"], 295_904_454 + 768),
        (["model=unet_ddpmpp"], 55_733_891 - 9 * 128),
        (["model=unet_edm"], 55_733_891),  # EDM's own count
        (["experiment=cifar10_edm"], 55_733_891),
    ],
)
def test_unets_have_the_papers_parameters(overrides, expected):
    """Catches a layer too many, attention at the wrong levels, biases that come or go."""
    assert parameters(*overrides) == expected


@pytest.mark.parametrize(
    ("preset", "expected", "width"),
    [
        ("dit_s", 32_963_360, 384),
        ("dit_b", 130_512_416, 768),
        ("dit_l", 458_102_816, 1024),
        ("dit_xl", 675_129_632, 1152),
    ],
)
def test_dits_have_the_papers_parameters(preset, expected, width):
    """DiT's Table 1, on its latents; its count holds the fixed table of positions, which is no parameter here."""
    latents = ["data.image_size=32", "data.channels=4", "model.num_classes=1000", "model.learned_variance=true"]
    assert parameters(f"model={preset}", *latents) + 16 * 16 * width == expected
