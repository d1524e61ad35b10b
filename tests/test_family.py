"""Every schedule, objective, loss, density and sampler from the command line, together."""

import numpy as np
import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.densities import Stratified
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import X0, Edm, Eps, V
from src.diffusion.objectives import Flow as FlowObjective
from src.diffusion.schedules import Laplace, Linear
from src.diffusion.weightings import P2, Constant, MinSNR, Sigmoid
from src.diffusion.weightings import Edm as EdmWeighting
from src.runs import Run
from tests.helpers import rows

SCHEDULES = {
    "linear": "eps",
    "cosine": "v",
    "karras": "edm",
    "ve": "eps",
    "flow": "flow",
}
SAMPLERS = [
    *("ddpm", "ddim", "euler", "euler_ancestral", "heun", "heun_churn", "midpoint", "flow_euler"),
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc", "edm"),
]


@pytest.fixture(scope="module", params=SCHEDULES)
def oracle_run(request, tmp_path_factory):
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("oracle") / request.param
    arguments = ["experiment=smoke", "model=oracle", "trainer.max_steps=1", f"hydra.run.dir={folder}"]
    argv = sys.argv
    sys.argv = ["src.train", f"schedule={request.param}", f"objective={SCHEDULES[request.param]}", *arguments]
    try:
        importlib.import_module("src.train").main()
    finally:
        sys.argv = argv
    return folder


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_draws_the_images_that_the_oracle_knows(command, oracle_run, sampler, tmp_path):
    """The exact denoiser of a finite set leads every sampler, under every schedule, to images of the set."""
    steps = "sampler.steps=100" if sampler == "ddpm" else "sampler.steps=50"
    outcome = command("sample", f"run={oracle_run}", f"sampler={sampler}", steps, f"out={tmp_path}", "num_samples=8")
    assert outcome.code == 0, outcome.err
    samples = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"]).float().flatten(1)
    from src.build import build

    data = build(Run(oracle_run).config["data"], "data")
    data.setup()
    nearest = torch.cdist(samples, data.train.images.float().flatten(1)).min(1).values
    assert (nearest / 8 < 4).all(), nearest / 8  # root mean square, in grey levels of 255


@pytest.mark.parametrize(
    "parts",
    [
        ["schedule=cosine", "model.learned_variance=true", "loss=hybrid", "sampler=ddpm_learned", "sampler.steps=10"],
        ["schedule=karras", "objective=edm", "density=log_normal", "loss=uncertainty"],
        ["model.self_conditioning=true", "offset_noise=0.1", "model.num_classes=10", "model.scale_shift_norm=true"],
        [
            *("model.learned_variance=true", "loss=vlb", "density=importance", "density.history=2"),
            *("schedule.num_timesteps=4", "weighting=sigmoid", "callbacks.samples.sampler.steps=4"),
        ],
    ],
    ids=["hybrid", "uncertainty", "self_conditioning", "importance"],
)
def test_a_run_with_extras_resumes_to_the_bit_and_samples(command, parts, tmp_path):
    """Catches what a checkpoint forgets: the history of losses, the learned uncertainty, the coin of a batch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command("train", "experiment=smoke", *parts, f"hydra.run.dir={whole}").code == 0
    first = command("train", "experiment=smoke", *parts, "trainer.max_steps=10", f"hydra.run.dir={cut}")
    assert first.code == 0, first.err
    assert command("train", f"run={cut}", "trainer.max_steps=20").code == 0
    a, b = (Run(folder).load_checkpoint() for folder in (whole, cut))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key in a["state_dict"]:
        assert torch.equal(a["state_dict"][key], b["state_dict"][key]), key
    for key in a["density"]:
        assert torch.equal(a["density"][key], b["density"][key])
    assert rows(whole)[-1] == rows(cut)[-1]
    outcome = command("sample", f"run={whole}", "num_samples=2", f"out={tmp_path / 'samples'}")
    assert outcome.code == 0, outcome.err


def test_the_uncertainty_learns_and_the_importance_is_used(command, tmp_path):
    parts = ["loss=uncertainty", "density=importance", "density.history=1", "schedule.num_timesteps=4"]
    parts += ["callbacks.samples.sampler.steps=4"]
    assert command("train", "experiment=smoke", *parts, f"hydra.run.dir={tmp_path}").code == 0
    checkpoint = Run(tmp_path).load_checkpoint()
    assert checkpoint["state_dict"]["loss.linear.weight"].abs().max() > 0
    assert (checkpoint["density"]["counts"] > 1).all()


def test_offset_noise_is_one_number_an_image_and_channel():
    from src.randomness import RowNoise
    from src.training.module import DiffusionModule

    module = DiffusionModule.__new__(DiffusionModule)
    torch.nn.Module.__init__(module)
    module.offset_noise = 0.5
    module.noise, module.channel_noise = (RowNoise(seed, torch.device("cpu")) for seed in (3, 4))
    noise = module.draw_noise(0, range(2000), 2000, torch.zeros(2000, 3, 4, 4))
    means = noise.mean((2, 3))
    assert means.var().item() == pytest.approx(0.25 + 1 / 16, rel=0.05)
    assert (noise - means[..., None, None]).var().item() == pytest.approx(15 / 16, rel=0.02)
    assert abs(torch.corrcoef(means.T)[0, 1].item()) < 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["loss=hybrid"], "add model.learned_variance=true, or choose loss=simple"),
        (["model.learned_variance=true"], "add loss=hybrid or loss=vlb"),
        (["sampler=ddpm_learned"], "variance=learned needs a network that learns the variance"),
        (["schedule=flow"], "Eps does not tell the image"),
        (
            ["schedule=flow", "objective=flow", "loss=hybrid", "model.learned_variance=true"],
            "a chain of discrete steps",
        ),
        (["schedule=karras", "schedule.sigma_max=0.001"], "sigma_min below sigma_max"),
        (["schedule=flow", "objective=flow", "schedule.shift=0"], "shift=0 must be positive"),
        (["offset_noise=-1"], "offset_noise=-1 must not be negative"),
        (["density=log_normal", "density.std=0"], "std=0 must be positive"),
        (["density=importance", "density.history=0"], "history=0 must be at least 1"),
        (["sampler=unipc", "sampler.steps=1"], "steps=1 are fewer than order=2 needs"),
        (["sampler=heun", "sampler.s_churn=-1"], "must not be negative"),
        (["sampler.percentile=0"], "percentile=0 must lie in (0, 1]"),
        (["model=oracle", "model.num_images=0"], "num_images=0 must be at least 1"),
        (["model=oracle", "model.num_images=3", "model.num_classes=10"], "num_classes=10: no image has the label"),
        (["model.num_classes=3"], "model.num_classes=3 is less than data.num_classes=10"),
        (["weighting=sigmoid", "schedule.zero_terminal_snr=true", "objective=v"], "Sigmoid has no finite weight"),
        (["callbacks.checkpoint.keep_every_n_steps=0"], "keep_every_n_steps=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(command, arguments, sentence, tmp_path):
    folder = tmp_path / "run"
    outcome = command("train", "experiment=smoke", *arguments, f"hydra.run.dir={folder}")
    assert outcome.code == 2
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err
    assert not folder.exists()


@pytest.mark.parametrize(
    "schedule", [Karras(), VE(), Flow(), Flow(shift=3.0), Laplace(), Linear()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("objective", [Eps(), X0(), V(), FlowObjective(), Edm()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("weighting", [Constant(), MinSNR(), P2(), Sigmoid(), EdmWeighting()], ids=repr)
def test_each_objective_and_weighting_goes_with_each_schedule_that_it_can(schedule, objective, weighting):
    """A finite loss and gradient at 64 even levels; eps alone cannot, where no signal is left."""
    if isinstance(schedule, Flow) and isinstance(objective, Eps):
        with pytest.raises(ValueError, match="Eps does not tell the image"):
            GaussianDiffusion(schedule, objective, weighting, Stratified())
        return
    diffusion = GaussianDiffusion(schedule, objective, weighting, Stratified())
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    x0, noise = torch.randn(2, 64, 1, 4, 4)
    t = schedule.time(diffusion.draw_u(64, x0.device))
    loss = diffusion.p_losses(lambda x, t: net(x) + t.view(-1, 1, 1, 1).float().tanh(), x0, t, noise)
    loss.mean().backward()
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()
    assert torch.isfinite(net.weight.grad).all()
