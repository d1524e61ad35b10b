"""python -m src.convert and init_from=: weights of others go the way of a run's own, and bad files go nowhere."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from src.runs import LAST, Run
from tests.interop.made import TINY, made
from tests.parity.peers import Weights, edm, openai

ADM = {"base": 32, "mults": (1, 2), "blocks": 1, "attend": (2,), "heads": lambda c: 2, "classes": 0, "out": 3}
ADM |= {"scale_shift": True, "updown": True, "new": False}
SMOKE = "experiment=smoke"
GUIDED = ["format=guided_diffusion", "data.image_size=16", "model.num_heads=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of diffusers of 8x8 digits, without the configuration that ours have in their metadata."""
    from src.interop import diffusers

    base = tmp_path_factory.mktemp("diffusers")
    run = Run(made(base / "run", *TINY, "schedule.beta_end=0.03", "sampler=ddpm"))
    (base / "theirs").mkdir()
    diffusers.write(run.load_net("ema"), run.config, base / "theirs")
    for file in (base / "theirs").rglob("*.safetensors"):
        save_file(load_file(file), file)
    return base / "theirs"


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """A state dict of guided-diffusion."""
    weights, path = Weights(), tmp_path_factory.mktemp("adm") / "model.safetensors"
    openai(weights, torch.randn(1, 3, 16, 16), torch.zeros(1), **ADM)
    save_file(dict(weights), path)
    return path


def test_a_folder_of_diffusers_becomes_a_run(folder, command, tmp_path):
    """Sampled directly and after conversion, the same images; what is said beside the source stays said."""
    outcome = command("convert", f"source={folder}", f"out={tmp_path}/run", "optimizer.lr=1e-5")
    assert outcome.code == 0, outcome.err
    assert f"init_from={tmp_path}/run" in outcome.out
    run = Run(tmp_path / "run")
    assert (run.config["name"], run.config["optimizer"]["lr"], run.config["seed"]) == ("run", 1e-5, 0)
    assert run.config["schedule"]["beta_end"] == 0.03
    assert run.config["data"]["source"] == {"_target_": "src.data.sources.Digits"}
    assert run.config["choices"]["schedule"] == "linear"
    drawn = []
    for name, source in (("a", folder), ("b", run.folder)):
        out = f"out={tmp_path}/{name}"
        outcome = command("sample", f"run={source}", "sampler.steps=3", "num_samples=2", out)
        assert outcome.code == 0, outcome.err
        drawn.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert np.array_equal(*drawn)


def test_settings_of_the_user_win_over_those_of_the_source(folder, command, tmp_path):
    """An option of a group as a whole, a setting alone."""
    command("convert", f"source={folder}", f"out={tmp_path}/a", "schedule=cosine", "model.dropout=0.25")
    run = Run(tmp_path / "a")
    assert run.config["schedule"]["_target_"].endswith("Cosine")
    assert (run.config["model"]["dropout"], run.config["model"]["base_channels"]) == (0.25, 16)
    command("convert", f"source={folder}", f"out={tmp_path}/b", "schedule.beta_start=2e-4")
    schedule = Run(tmp_path / "b").config["schedule"]
    assert (schedule["beta_start"], schedule["beta_end"]) == (2e-4, 0.03)


def test_a_converted_run_says_how_it_is_previewed(folder, command, tmp_path):
    """Its overrides are those of a training: schedule, network and all."""
    command("convert", f"source={folder}", f"out={tmp_path}/run")
    outcome = command("preview", f"run={tmp_path}/run", "--cfg", "job")
    assert outcome.code == 0, outcome.err
    assert "beta_end: 0.03" in outcome.out
    assert "base_channels: 16" in outcome.out


def test_fine_tuning_begins_with_the_weights(folder, command, tmp_path):
    """After a step that changes nothing, weights and averages are the source's; network and schedule are taken over."""
    arguments = [f"init_from={folder}", "experiment=smoke", "optimizer.lr=1e-30", "trainer.max_steps=1"]
    outcome = command("train", *arguments, "lr_schedule.warmup_steps=0", f"hydra.run.dir={tmp_path}/tuned")
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "tuned")
    assert run.config["schedule"]["beta_end"] == 0.03
    assert run.config["model"]["base_channels"] == 16
    source = Run(folder).load_net("ema").state_dict()
    for weights in ("raw", "ema"):
        tuned = run.load_net(weights).state_dict()
        for key, value in source.items():
            torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-7)


def test_what_cannot_be_gone_on_with_is_told_from_what_can_be_begun_with(folder, command, tmp_path):
    command("convert", f"source={folder}", f"out={tmp_path}/run")
    for arguments, message in (
        ([f"run={tmp_path}/run"], f"begin a new run with them: init_from={tmp_path}/run"),
        ([f"run={folder}"], "init_from=<it>"),
        ([f"init_from={tmp_path}/nothing"], f"init_from={tmp_path}/nothing is neither a run folder"),
        ([f"init_from={folder}", "data=mnist", SMOKE], "a network for images of 1x8x8"),
        ([f"init_from={folder}", "model.base_channels=32", SMOKE], "another architecture: time_embedding.1.weight is"),
    ):
        outcome = command("train", *arguments, f"hydra.run.dir={tmp_path}/out")
        assert outcome.code == 2, outcome
        assert message in outcome.err
        assert not list((tmp_path / "out").glob("*"))


class Trap:
    """What a pickle can do to those who load it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def renamed(source, target, change):
    target.mkdir()
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())
    change(target)


def edit(name, **settings):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def weights(change):
    def rewrite(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return rewrite


FOLDERS = {
    "a key is missing": (weights(lambda s: s.pop("conv_in.bias")), "it lacks conv_in.bias;"),
    "a key is too many": (weights(lambda s: s.update(extra=torch.zeros(1))), "has extra, which the network has no"),
    "another shape": (
        weights(lambda s: s.update({"conv_in.bias": torch.zeros(3)})),
        "conv_in.bias is [3] there and [16] in the network",
    ),
    "cut off": (
        lambda f: [p.write_bytes(p.read_bytes()[:-100]) for p in f.rglob("*.safetensors")],
        "is damaged or not a file of weights (it has ",
    ),
    "no weights": (lambda f: [p.unlink() for p in f.rglob("*.safetensors")], "has no diffusion_pytorch_model"),
    "no json": (lambda f: (f / "unet" / "config.json").write_text("{"), "config.json cannot be read"),
    "other widths": (
        edit("unet/config.json", block_out_channels=[16, 64]),
        "is [32, 16, 3, 3] there and [64, 16, 3, 3]",
    ),
    "a vae": (edit("model_index.json", vae=["diffusers", "AutoencoderKL"]), "is a pipeline with a vae"),
    "of text": (edit("unet/config.json", _class_name="UNet2DConditionModel"), "describes a UNet2DConditionModel"),
    "NCSN++": (
        edit("unet/config.json", down_block_types=["SkipDownBlock2D"] * 2),
        "blocks of the type SkipDownBlock2D cannot be read",
    ),
    "a new setting": (edit("unet/config.json", depth=3), "depth=3 is not a setting of UNet2DModel that this project"),
    "fourier": (edit("unet/config.json", time_embedding_type="fourier"), "time_embedding_type=fourier cannot be read"),
    "prediction": (edit("scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type=flow cannot be"),
    "betas": (edit("scheduler/scheduler_config.json", beta_schedule="laplace"), "beta_schedule=laplace cannot be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_what_it_says_is_refused(name, folder, command, tmp_path):
    change, message = FOLDERS[name]
    renamed(folder, tmp_path / "theirs", change)
    name, key = ("sample", "run") if name in ("cut off", "another shape", "a vae") else ("convert", "source")
    outcome = command(name, f"{key}={tmp_path}/theirs", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_pickle_is_never_run(how, command, tmp_path):
    """The file that it would make is not there."""
    file, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    with file.open("wb") as opened:
        (torch.save if how == "torch.save" else pickle.dump)({"ema": Trap(sprung)}, opened)
    outcome = command("convert", f"source={file}", *GUIDED, f"out={tmp_path}/out")
    assert outcome.code == 2
    assert "holds more than tensors" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not sprung.exists()
    torch.load(file, weights_only=False) if how == "torch.save" else pickle.loads(file.read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source={tmp}/nowhere"], "source={tmp}/nowhere does not exist"),
        (["source={adm}"], "does not show what it is; say so with format="),
        (["source={adm}", "format=guided_diffusion", "model.num_heads=2"], "add data.image_size=64"),
        (["source={adm}", "format=guided_diffusion", "data.image_size=16"], "how many heads its attention has"),
        (["source={adm}", *GUIDED[:2], "model.num_heads=3"], "num_heads=3 does not divide"),
        (["source={adm}", *GUIDED, "format=edm_state_dict"], "is no state dict of EDM's networks"),
        (["source={adm}", *GUIDED, "format=diffusers"], "is no folder of diffusers"),
        (["source={adm}", *GUIDED, "format=safetensors"], "holds weights and not the network they are of"),
        (["source={adm}", *GUIDED, "format=improved_diffusion", "qkv_order=new"], "qkv_order=new is of format=guided"),
        (["source={adm}", *GUIDED, "format=keras"], "format=keras is not one of diffusers, improved_diffusion"),
        (["source={adm}", *GUIDED, "model.resampling=conv"], "has input_blocks.2.0"),
        (["source={adm}", *GUIDED[::2], "data=mnist"], "data has images of 1x28x28, and the network's are 3x28x28"),
        (["source={edm}", *GUIDED], "is no state dict of improved-diffusion or guided-diffusion: it lacks time_embed"),
        (["source={edm}", "model.image_size=7"], "cannot halve images of 7x7"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, adm, command, tmp_path):
    of_edm = Weights()
    settings = {"base": 32, "mults": (1, 1), "blocks": 1, "attend": (), "classes": 0}
    edm(of_edm, torch.randn(1, 1, 8, 8), torch.zeros(1), song=True, **settings)
    save_file({k: v.contiguous() for k, v in of_edm.items()}, tmp_path / "edm.safetensors")
    names = {"tmp": tmp_path, "adm": adm, "edm": tmp_path / "edm.safetensors"}
    outcome = command("convert", *(a.format(**names) for a in arguments), f"out={tmp_path}/out")
    assert outcome.code == 2, outcome
    assert message.format(**names) in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_over(adm, command, tmp_path):
    arguments = ["convert", f"source={adm}", *GUIDED, f"out={tmp_path}/run"]
    assert command(*arguments).code == 0
    before = (tmp_path / "run" / LAST).read_bytes()
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "already holds a run" in outcome.err
    assert (tmp_path / "run" / LAST).read_bytes() == before
