"""Class-conditional runs from the command line."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def conditional_run(tmp_path_factory):
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("conditional") / "run"
    argv = sys.argv
    sys.argv = [
        "src.train",
        "experiment=smoke",
        "model.num_classes=10",
        "optimizer.lr=0.003",
        "trainer.max_steps=100",
        "callbacks.checkpoint.keep_every_n_steps=30",
        f"hydra.run.dir={folder}",
    ]
    try:
        importlib.import_module("src.train").main()
    finally:
        sys.argv = argv
    return folder


@pytest.fixture
def draw(command, conditional_run, tmp_path):
    def run(*arguments):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        outcome = command("sample", f"run={conditional_run}", f"out='{out}'", "sampler.steps=10", *arguments)
        assert outcome.code == 0, outcome.err
        return np.load(out / "samples.npz")

    return run


def test_labels_are_written_beside_the_samples(draw):
    samples = draw("labels=[3,3,7]")
    assert samples["arr_1"].tolist() == [3, 3, 7]
    assert (samples["arr_1"].dtype, samples["arr_0"].shape) == (np.int64, (3, 8, 8, 1))


def test_all_labels_take_turns(draw):
    assert draw("labels=all", "num_samples=12")["arr_1"].tolist() == [*range(10), 0, 1]


def test_labels_matter_and_no_labels_are_possible(draw):
    three, seven, none = (draw(*a)["arr_0"] for a in (["labels=[3]"], ["labels=[7]"], ["num_samples=1"]))
    assert (three != seven).any()
    assert (three != none).any()


def test_guidance_of_one_is_none_and_of_zero_is_unconditional(draw):
    plain = draw("labels=[3,5,8]")["arr_0"]
    np.testing.assert_array_equal(draw("labels=[3,5,8]", "guidance=cfg", "guidance.scale=1")["arr_0"], plain)
    zero = draw("labels=[3,5,8]", "guidance.scale=0")["arr_0"]
    np.testing.assert_array_equal(zero, draw("num_samples=3")["arr_0"])
    assert (draw("labels=[3,5,8]", "guidance=cfg")["arr_0"] != plain).any()


def test_cfg_pp_has_a_noise_of_its_own(draw):
    one = draw("labels=[3,5,8]", "guidance=cfg_pp", "guidance.scale=1")["arr_0"]
    assert (one != draw("labels=[3,5,8]")["arr_0"]).any()  # the conditional x0 with the unconditional noise


def test_an_earlier_checkpoint_guides(draw, conditional_run):
    """Autoguidance: with the model itself for a guide, nothing changes; with an earlier one, something does."""
    assert [p.name for p in sorted((conditional_run / "checkpoints").glob("step=*"))] == [
        f"step={n}.ckpt" for n in (30, 60, 90)
    ]

    def guided(name, *arguments):
        guide = conditional_run / "checkpoints" / name
        return draw("num_samples=3", "guidance=autoguidance", f"guidance.guide='{guide}'", *arguments)["arr_0"]

    plain = draw("num_samples=3")["arr_0"]
    assert np.abs(guided("last.ckpt").astype(int) - plain).max() <= 1
    assert (guided("step=30.ckpt") != plain).any()
    np.testing.assert_array_equal(guided("step=30.ckpt", "guidance.scale=1"), plain)


def test_sample_i_with_its_label_does_not_depend_on_the_batch(draw):
    whole = draw("labels=all", "num_samples=12", "guidance=cfg")
    parts = draw("labels=all", "num_samples=12", "guidance=cfg", "batch_size=5")
    np.testing.assert_array_equal(whole["arr_0"], parts["arr_0"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["labels=[3,10]"], "labels=[3, 10] must be all, or a list of whole numbers from 0 to 9"),
        (["labels=[-1]"], "whole numbers from 0 to 9"),
        (["labels=some"], "labels=some must be all"),
        (["labels=[]"], "labels=[] must be all, or a list of whole numbers from 0 to 9"),
        (["schedule=cosine"], "this command has no group or setting schedule"),
        (["guidance=cfg"], "needs labels to guide towards: no labels were given"),
        (["labels=all", "guidance=cfg", "guidance.scale=-2"], "scale=-2 must not be negative"),
        (["guidance=cfg_pp"], "needs labels to guide towards: no labels were given"),
        (["labels=all", "guidance=cfg_pp", "guidance.scale=2"], "scale=2 of CFG++ must lie between 0 and 1"),
        (
            ["labels=all", "guidance=cfg_pp", "sampler=heun"],
            "CFGPP keeps the noise of another model, which Heun cannot",
        ),
        (["guidance=autoguidance"], "guidance.guide has no value"),
        (
            ["guidance=autoguidance", "guidance.guide=nowhere"],
            "guidance.guide=nowhere is neither a run folder nor a .ckpt",
        ),
        (["sampler=ddpm_learned"], "variance=learned needs a network that learns the variance"),
    ],
)
def test_labels_that_cannot_be(command, conditional_run, tmp_path, arguments, sentence):
    outcome = command("sample", f"run={conditional_run}", f"out={tmp_path / 'out'}", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["labels=all"], ["guidance=cfg"]])
def test_an_unconditional_model_has_neither_labels_nor_guidance(command, smoke_run, tmp_path, arguments):
    outcome = command("sample", f"run={smoke_run}", f"out={tmp_path / 'out'}", *arguments)
    assert outcome.code == 2
    assert "was trained without labels" in outcome.err


def test_guidance_of_a_network_that_never_lacked_a_label_is_noted(command, tmp_path):
    run = tmp_path / "run"
    arguments = ["model.num_classes=10", "label_dropout=0", "trainer.max_steps=1", "callbacks.samples.num_samples=1"]
    assert command("train", "experiment=smoke", *arguments, f"hydra.run.dir={run}").code == 0
    guided = ["labels=[3]", "guidance=cfg", "sampler.steps=2"]
    for settings, noted in ((guided, True), (guided[:1] + guided[2:], False)):
        outcome = command("sample", f"run={run}", f"out={tmp_path}/out", *settings)
        assert outcome.code == 0, outcome.err
        assert ("note: the run was trained with label_dropout=0" in outcome.out) == noted


def test_labels_are_dropped_per_image(monkeypatch):
    """Catches one coin for the whole batch."""
    from src.diffusion.densities import Uniform
    from src.diffusion.gaussian import GaussianDiffusion
    from src.diffusion.objectives import Eps
    from src.diffusion.schedules import Linear
    from src.diffusion.weightings import Constant as ConstantWeight
    from src.training.ema import EMA
    from src.training.guard import Guard
    from src.training.lr import Constant
    from src.training.module import DiffusionModule

    class Net(torch.nn.Module):
        num_classes = 10

    diffusion = GaussianDiffusion(Linear(), Eps(), ConstantWeight(), Uniform())
    module = DiffusionModule(Net(), diffusion, None, Constant(), None, EMA(), Guard(), seed=0, label_dropout=0.25)
    y = torch.arange(10).repeat(1000)
    dropped = module.drop_labels(y, torch.rand(len(y)))
    none = dropped == 10
    assert torch.equal(dropped[~none], y[~none])
    assert none.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 10000) ** 0.5)
    per_batch = none.view(-1, 100).float().mean(1)
    assert 0 < per_batch.min() < per_batch.max() < 1


def test_a_data_set_with_other_labels_than_it_says_is_refused(command, tmp_path):
    outcome = command("train", "experiment=smoke", "data.num_classes=5", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "the labels run from 0 to 9, which data.num_classes=5 does not allow" in outcome.err
