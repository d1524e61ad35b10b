"""State dicts of improved-diffusion, guided-diffusion and EDM, read by src.convert: the same functions."""

import pytest
import torch
from safetensors.torch import save_file

from src.diffusion.levels import Level
from src.runs import Run, build_diffusion, build_net
from tests.parity.peers import Weights, edm, openai

IMPROVED = {"base": 32, "mults": (1, 2), "blocks": 1, "attend": (2,), "heads": lambda c: 4, "classes": 0, "out": 6}
IMPROVED |= {"scale_shift": True, "updown": False, "new": False}
GUIDED = {**IMPROVED, "attend": (1, 2), "heads": lambda c: c // 16, "updown": True, "mults": (2, 3), "classes": 3}
OPENAI = {
    "improved": (IMPROVED, ["format=improved_diffusion", "model.num_heads=4", "schedule=cosine_4000"]),
    "improved without scale and shift": (
        {**IMPROVED, "scale_shift": False, "out": 3, "attend": ()},
        ["format=improved_diffusion", "model.num_heads=4", "schedule.num_timesteps=500"],
    ),
    "guided": (GUIDED, ["format=guided_diffusion", "model.channels_per_head=16"]),
    "guided, new order": (
        {**GUIDED, "new": True, "mults": (0.5, 1, 2), "base": 64},
        ["format=guided_diffusion", "model.channels_per_head=16", "qkv_order=new"],
    ),
}
EDM = {"base": 32, "mults": (2, 2), "blocks": 2, "attend": (8,), "classes": 0}


@pytest.mark.parametrize("name", OPENAI)
def test_openais_networks_are_the_same_functions(name, command, tmp_path):
    """Catches the order of q, k and v, cosines, eps, padding, who is added to what, and a time that is not rescaled."""
    settings, overrides = OPENAI[name]
    weights, x, t = Weights(), torch.randn(2, 3, 16, 16), torch.tensor([3, 499])
    y = torch.tensor([2, 0]) if settings["classes"] else None
    T = {"improved": 4000, "improved without scale and shift": 500}.get(name, 1000)
    expected = openai(weights, x, t * (1000 / T), y, **settings)
    torch.save(dict(weights), tmp_path / "model.pt")
    outcome = command("convert", f"source={tmp_path}/model.pt", "data.image_size=16", f"out={tmp_path}/run", *overrides)
    assert outcome.code == 0, outcome.err
    net = Run(tmp_path / "run").load_net("ema")
    with torch.no_grad():
        ours = net(x, t, *([] if y is None else [y]))
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert net.learned_variance == (settings["out"] == 6)


@pytest.mark.parametrize("song", [True, False], ids=["ddpmpp", "adm"])
@pytest.mark.parametrize("classes", [0, 3])
def test_edms_networks_are_the_same_functions(song, classes, command, tmp_path):
    """Network and preconditioning: D(x; sigma) of EDM's Eq. 7 against our denoiser, "none" among the labels."""
    weights, sigma = Weights(), 0.7
    settings = {
        **EDM,
        "song": song,
        "base": 32 if song else 64,
        "mults": (2, 2) if song else (1, 2),
        "classes": classes,
    }
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([classes, 1]) if classes else None
    noise = torch.full((2,), sigma).log() / 4
    scale = (sigma**2 + 0.5**2) ** 0.5
    told = torch.randn(2, 9) if song else None
    F = edm(weights, x / scale, noise, y, **settings, augment=None if told is None else torch.zeros(2, 9))
    expected = 0.25 / scale**2 * x + sigma * 0.5 / scale * F
    save_file({f"model.{key}": v.contiguous() for key, v in weights.items()}, tmp_path / "model.safetensors")
    outcome = command("convert", f"source={tmp_path}/model.safetensors", f"out={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    denoise = build_diffusion(run.config).denoiser(run.load_net("ema"), y)
    with torch.no_grad():
        ours = denoise(x, Level(float(noise[0]), 1.0, sigma)).x0
    assert F.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    if told is not None:  # a network that is told what its augmentation did
        augmented = edm(weights, x / scale, noise, y, **settings, augment=told)
        assert (augmented - F).abs().max() > 0.01
        net = run.load_net("ema")
        assert net.augment_dim == 9
        with torch.no_grad():
            ours = net(x / scale, noise, *([] if y is None else [y]), augment=told)
        torch.testing.assert_close(ours, augmented, rtol=0, atol=1e-4)


def test_presets_are_the_networks_of_edm():
    """conf/model/unet_ddpmpp.yaml's options are those that EDM's own weights are read with, its sizes aside."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from src.cli import CONF
    from src.interop.edm import infer, stripped

    weights = Weights()
    edm(weights, torch.randn(1, 3, 16, 16), torch.zeros(1), song=True, **EDM)
    read = infer(stripped(weights), CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        preset = OmegaConf.to_container(compose("train", ["model=unet_ddpmpp", "data=cifar10"]).model, resolve=True)
    sizes = ("image_size", "base_channels", "channel_mults", "num_res_blocks", "attention_resolutions", "dropout")
    for key in sizes:
        preset[key] = read[key]
    torch.manual_seed(0)
    assert str(build_net({"model": {**read, "skip_scale": preset["skip_scale"]}})) == str(build_net({"model": preset}))
    assert read["skip_scale"] == pytest.approx(preset["skip_scale"], abs=1e-15)
    assert {k: preset[k] for k in read if k != "skip_scale"} == {k: v for k, v in read.items() if k != "skip_scale"}
