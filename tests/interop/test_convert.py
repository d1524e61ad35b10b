"""python -m src.convert and init_from=: weights of others go the way of a run's own, and bad files go nowhere."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from src.interop import own
from src.runs import LAST, PARTS, Run
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


def edm_state():
    """A state dict of EDM's."""
    weights = Weights()
    settings = {"base": 32, "mults": (1, 1), "blocks": 1, "attend": (), "classes": 0}
    edm(weights, torch.randn(1, 1, 8, 8), torch.zeros(1), song=True, **settings)
    return {key: v.contiguous() for key, v in weights.items()}


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


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_dict_of_edm_is_sampled_as_it_is_and_converted(suffix, command, tmp_path):
    """It says all that there is to know of it."""
    file = tmp_path / f"edm.{suffix}"
    save_file(edm_state(), file) if suffix == "safetensors" else torch.save(edm_state(), file)
    command("convert", f"source={file}", f"out={tmp_path}/run")
    drawn = []
    for name, source in (("a", file), ("b", tmp_path / "run")):
        outcome = command("sample", f"run={source}", "sampler.steps=3", "num_samples=2", f"out={tmp_path}/{name}")
        assert outcome.code == 0, outcome.err
        drawn.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert np.array_equal(*drawn)


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

    def __init__(self, path, call=Path.touch):
        self.call, self.path = call, path

    def __reduce__(self):
        return (self.call, (self.path,))


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


def metadata(parts):
    """A configuration in the file of weights, as ours have it, with these parts in place of its own."""

    def rewrite(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        plain = {key: {} for key in PARTS}
        save_file(load_file(file), file, {"config": json.dumps({**plain, "overrides": [], **parts})})

    return rewrite


def header(content):
    """A file of weights with this header and no tensors."""

    def rewrite(folder):
        text = json.dumps(content).encode()
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text)

    return rewrite


def variants(folder):
    """Weights in two precisions, and not in the plain one."""
    (file,) = folder.rglob("*.safetensors")
    for kind in ("bf16", "fp16"):
        shutil.copy(file, file.with_suffix(f".{kind}.safetensors"))
    file.unlink()


def indexed(file, places):
    """An index in place of a file of weights."""
    Path(f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    file.unlink()


CODE = "only classes of this project are called"
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
        "down_block_types with SkipDownBlock2D cannot be read",
    ),
    "upwards first": (
        edit("unet/config.json", down_block_types=["UpBlock2D", "DownBlock2D"]),
        "down_block_types with UpBlock2D cannot be read",
    ),
    "two variants": (variants, "leave one of them there"),
    "a part that is not there": (
        lambda f: [indexed(p, {"a": "1.safetensors"}) for p in f.rglob("*.safetensors")],
        "names 1.safetensors, which is not beside it",
    ),
    "a part elsewhere": (
        lambda f: [indexed(p, {"a": "../../x.safetensors"}) for p in f.rglob("*.safetensors")],
        "names ../../x.safetensors, which is not beside it",
    ),
    "a new setting": (edit("unet/config.json", depth=3), "depth=3 is not a setting of UNet2DModel that this project"),
    "fourier": (edit("unet/config.json", time_embedding_type="fourier"), "time_embedding_type=fourier cannot be read"),
    "prediction": (edit("scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type=flow cannot be"),
    "betas": (edit("scheduler/scheduler_config.json", beta_schedule="laplace"), "beta_schedule=laplace cannot be read"),
    "no betas": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
        ),
        "a FlowMatchEulerDiscreteScheduler has no betas",
    ),
    "a threshold": (
        edit("scheduler/scheduler_config.json", thresholding=True, sample_max_value=1.5),
        "sample_max_value=1.5 cannot be read",
    ),
    "betas of null": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text(
            '{"_class_name": "IPNDMScheduler", "trained_betas": null}'
        ),
        "a IPNDMScheduler has no betas",
    ),
    "continuous times": (
        edit("scheduler/scheduler_config.json", timestep_type="continuous"),
        "timestep_type=continuous cannot be read",
    ),
    "no metadata": (header({"__metadata__": None}), "is damaged or not a file of weights"),
    "metadata that are no texts": (header({"__metadata__": {"config": 1}}), "its __metadata__ holds more than texts"),
    "no offsets": (header({"a": {"data_offsets": []}}), "is damaged or not a file of weights"),
    "code in its configuration": (metadata({"schedule": {"_target_": "os.system", "command": "touch {sprung}"}}), CODE),
    "code by another name": (metadata({"data": {"_target_": "src.files.Path", "x": 1}}), CODE),
    "code in a list": (metadata({"data": {"more": [{"_target_": "posix.system"}]}}), CODE),
    "code in its overrides": (metadata({"overrides": ["model._target_=os.system"]}), CODE),
    "code in a dictionary": (metadata({"overrides": ["model={_target_: os.system}"]}), CODE),
    "a flag in its overrides": (metadata({"overrides": ["--config-dir=theirs"]}), CODE),
    "Hydra's own": (metadata({"overrides": ["+hydra.job.env_set.LD_PRELOAD=evil.so"]}), CODE),
}
TYPES = {
    "unet/config.json": [
        ("block_out_channels", []),
        ("block_out_channels", [0, 32]),
        ("block_out_channels", "16"),
        ("down_block_types", None),
        ("down_block_types", ["DownBlock2D"]),
        ("flip_sin_to_cos", "false"),
        ("sample_size", "8"),
        ("sample_size", [8]),
        ("norm_eps", "1e-6"),
        ("layers_per_block", None),
        ("layers_per_block", 0),
    ],
    "scheduler/scheduler_config.json": [
        ("variance_type", None),
        ("num_train_timesteps", "1000"),
        ("beta_end", "0.02"),
        ("trained_betas", 1),
        ("clip_sample", "yes"),
        ("timestep_spacing", "karras"),
    ],
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


@pytest.mark.parametrize("kind", ["parts", "fp16"])
def test_weights_in_parts_or_in_another_precision_are_read(kind, folder, command, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    (file,) = theirs.rglob("*.safetensors")
    state, expected = load_file(file), Run(folder).load_net("ema").state_dict()
    if kind == "parts":
        names = sorted(state)
        parts = {"1-of-2.safetensors": names[::2], "2-of-2.safetensors": names[1::2]}
        for name, keys in parts.items():
            save_file({key: state[key] for key in keys}, file.parent / name)
        indexed(file, {key: name for name, keys in parts.items() for key in keys})
    else:
        file.unlink()
        save_file({key: v.half() for key, v in state.items()}, file.with_suffix(".fp16.safetensors"))
    found = Run(theirs).load_net("ema").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value if kind == "parts" else value.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("unet/config.json", "block_out_channels", [16, 64]), ("scheduler/scheduler_config.json", "prediction_type", "x")],
)
def test_what_was_changed_beside_weights_with_a_configuration_is_refused(file, key, value, command, tmp_path):
    """Catches settings that diffusers would take and we would not see."""
    from src.interop import diffusers

    run = Run(made(tmp_path / "run", *TINY))
    diffusers.write(run.load_net("ema"), run.config, tmp_path / "ours")
    assert Run(tmp_path / "ours").config == run.config
    edit(file, **{key: value})(tmp_path / "ours")
    outcome = command("convert", f"source={tmp_path}/ours", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{file}: {key}={value} is not the " in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_dit_of_another_type_is_one_sentence(command, tmp_path):
    config = {"_class_name": "DiTTransformer2DModel", "attention_head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    outcome = command("convert", f"source={tmp_path}", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert "attention_head_dim=null is not a whole number" in outcome.err


@pytest.mark.parametrize("betas", [None, [0.1, 0.2, 0.3, 0.4]])
def test_a_preview_of_weights_of_others_shows_their_network_and_schedule(betas, folder, command, tmp_path):
    """Catches the defaults in place of what the folder says, as it lies there and converted."""
    shutil.copytree(folder, tmp_path / "theirs")
    edit("scheduler/scheduler_config.json", trained_betas=betas)(tmp_path / "theirs")
    command("convert", f"source={tmp_path}/theirs", f"out={tmp_path}/run")
    for run in ("theirs", "run"):
        outcome = command("preview", f"run={tmp_path / run}", "--cfg", "job")
        assert outcome.code == 0, outcome.err
        shown = yaml.safe_load(outcome.out)
        assert shown["model"]["base_channels"] == 16
        assert shown["schedule"].get("betas") == betas
        assert betas or shown["schedule"]["beta_end"] == 0.03


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("adm", "time_embed.0.weight", torch.zeros(3)),
        ("adm", "input_blocks.0.0.weight", torch.zeros(3)),
        ("adm", "output_blocks.x.0.weight", torch.zeros(3)),
        ("edm", "map_layer0.weight", torch.zeros(3)),
    ],
)
def test_names_and_shapes_of_no_network_are_one_sentence(file, key, value, adm, command, tmp_path):
    state = load_file(adm) if file == "adm" else edm_state()
    save_file({**state, key: value}, tmp_path / "model.safetensors")
    arguments = GUIDED if file == "adm" else ["format=edm_state_dict"]
    outcome = command("convert", f"source={tmp_path}/model.safetensors", *arguments, f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert "describes no network that can be read" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


SETTINGS = [(file, key, value) for file, cases in TYPES.items() for key, value in cases]


@pytest.mark.parametrize(("file", "key", "value"), SETTINGS)
def test_a_setting_of_another_type_is_one_sentence(file, key, value, folder, command, tmp_path):
    """Sampled, a folder goes through the same reader, which one setting of each file shows."""
    renamed(folder, tmp_path / "theirs", edit(file, **{key: value}))
    name, argument = ("sample", "run") if (key, value) == TYPES[file][0] else ("convert", "source")
    outcome = command(name, f"{argument}={tmp_path}/theirs", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_file_of_weights_calls_nothing_but_this_project(kind, command, tmp_path):
    """A target of os.system in the configuration that a file brings along; in a run's folder it is the user's own."""
    run, sprung = Run(made(tmp_path / "run", *TINY)), tmp_path / "sprung"
    evil = {**run.config, "schedule": {"_target_": "os.system", "command": f"touch {sprung}"}}
    foreign = ["+callbacks.mine._target_=my.Callback", "callbacks.ema.also={a: {_target_: src.training.ema.Power}}"]
    for config, code in ((run.config, 0), ({**run.config, "overrides": foreign}, 0), (evil, 2)):
        file = tmp_path / f"weights.{kind}"
        if kind == "ckpt":
            torch.save({**run.load_checkpoint(), "config": config}, file)
        else:
            own.write(run.load_net("ema").state_dict(), config, file)
        outcome = command("sample", f"run={file}", f"out={tmp_path}/out", "sampler.steps=2", "num_samples=1")
        assert outcome.code == code, outcome.err
    assert CODE in outcome.err
    assert not sprung.exists()


def test_a_configuration_beside_a_model_of_diffusers_is_anybodys(folder, command, tmp_path):
    """Catches a downloaded folder with one file more, which would be taken for a run of the user's own."""
    sprung, theirs = tmp_path / "sprung", tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    config = Run(made(tmp_path / "run", *TINY)).config
    evil = {**config, "schedule": {"_target_": "os.system", "command": f"touch {sprung}"}}
    (theirs / "config.yaml").write_text(yaml.safe_dump(evil))
    outcome = command("sample", f"run={theirs}", f"out={tmp_path}/out", "sampler.steps=2", "num_samples=1")
    assert (outcome.code, outcome.out) == (2, "")
    assert "config.yaml, beside a model of diffusers, holds a configuration that calls 'os.system'" in outcome.err
    assert not sprung.exists()


def test_labels_that_were_never_dropped_are_missed(folder, command, tmp_path):
    """Catches samples for which a network of labels is given one that it never learned, without a word."""
    from src.interop import diffusers

    run = Run(made(tmp_path / "run", *TINY, "model.num_classes=3"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    diffusers.write(run.load_net("ema"), run.config, theirs)
    for file in theirs.rglob("*.safetensors"):
        save_file(load_file(file), file)
    assert command("convert", f"source={theirs}", f"out={tmp_path}/converted").code == 0
    for source, labels, noted in (
        (theirs, "null", True),
        (theirs, "all", False),
        (tmp_path / "converted", "null", True),
    ):
        arguments = [f"run={source}", f"labels={labels}", "sampler.steps=2", "num_samples=3"]
        outcome = command("sample", *arguments, f"out={tmp_path}/{source.name}-{labels}")
        assert outcome.code == 0, outcome.err
        assert ("never learned to do without labels" in outcome.out) == noted


def test_a_network_alone_predicts_noise_over_linear_times(folder, command, tmp_path):
    """A folder without a scheduler says neither; the defaults of a training, v, would draw nonsense of it."""
    outcome = command("convert", f"source={folder / 'unet'}", f"out={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "note: the file does not say its schedule of noise" in outcome.out
    config = Run(tmp_path / "run").config
    assert config["objective"]["_target_"].endswith(".Eps")
    assert config["schedule"]["_target_"].endswith(".Linear")
    command("convert", f"source={folder / 'unet'}", f"out={tmp_path}/v", "objective=v")
    assert Run(tmp_path / "v").config["objective"]["_target_"].endswith(".V")


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        ({}, {"_target_": "src.diffusion.samplers.DDPM", "clip": True, "spacing": "trailing"}),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}, {"eta": 0.0, "spacing": "leading"}),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None},
            {"clip": True},
        ),  # as written: clip_sample
        ({"thresholding": True, "sample_max_value": 1.0}, {"clip": True}),
        ({"thresholding": True, "sample_max_value": 100.0}, {"clip": "dynamic"}),
    ],
)
def test_a_scheduler_becomes_a_sampler(settings, sampler, folder, tmp_path):
    renamed(folder, tmp_path / "theirs", edit("scheduler/scheduler_config.json", **settings))
    found = Run(tmp_path / "theirs").config["sampler"]
    assert {key: found[key] for key in sampler} == sampler


def test_settings_of_data_go_with_the_data_of_the_source(folder, command, tmp_path):
    """data.dir= is no choice of data."""
    command("convert", f"source={folder}", f"out={tmp_path}/run", f"data.dir={tmp_path}", "data.batch_size=4")
    data = Run(tmp_path / "run").config["data"]
    assert data["source"] == {"_target_": "src.data.sources.Digits"}
    assert (data["dir"], data["batch_size"], data["image_size"]) == (str(tmp_path), 4, 8)
    arguments = [f"init_from={tmp_path}/run", f"data.dir={tmp_path}/other", "trainer.max_steps=1", "trainer=cpu"]
    outcome = command("train", *arguments, "callbacks.samples.num_samples=1", f"hydra.run.dir={tmp_path}/tuned")
    assert outcome.code == 0, outcome.err
    data = Run(tmp_path / "tuned").config["data"]
    assert (data["dir"], data["batch_size"]) == (f"{tmp_path}/other", 4)


def test_a_state_dict_without_what_tells_its_network_names_the_key(adm, tmp_path, command):
    state = load_file(adm)
    for name, wrong in {
        "middle_block.0.emb_layers.1.weight": {k: v for k, v in state.items() if "middle_block.0.emb" not in k},
        "output_blocks.0.0.in_layers.2.weight": {k: v for k, v in state.items() if "output_blocks" not in k},
        "sees 6 channels": {**state, "input_blocks.0.0.weight": state["input_blocks.0.0.weight"].repeat(1, 2, 1, 1)},
    }.items():
        save_file(wrong, tmp_path / "wrong.safetensors")
        outcome = command("convert", f"source={tmp_path}/wrong.safetensors", *GUIDED, f"out={tmp_path}/out")
        assert outcome.code == 2, outcome
        assert name in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_source_that_says_all_takes_no_settings(command, tmp_path):
    run = Run(made(tmp_path / "run", *TINY))
    file = tmp_path / "model.safetensors"
    own.write(run.load_net("ema").state_dict(), run.config, file)
    outcome = command("convert", f"source={file}", "schedule=cosine", f"out={tmp_path}/out")
    assert outcome.code == 2
    assert "schedule=cosine would change nothing" in outcome.err
    state = run.load_net("ema").state_dict()
    state.pop("conv_in.bias")
    own.write(state, run.config, file)
    outcome = command("convert", f"source={file}", f"out={tmp_path}/out")
    assert outcome.code == 2
    assert "the checkpoint has no conv_in.bias" in outcome.err
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
    save_file(edm_state(), tmp_path / "edm.safetensors")
    names = {"tmp": tmp_path, "adm": adm, "edm": tmp_path / "edm.safetensors"}
    outcome = command("convert", *(a.format(**names) for a in arguments), f"out={tmp_path}/out")
    assert outcome.code == 2, outcome
    assert message.format(**names) in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_calls_the_system_is_named(command, tmp_path):
    """Whose module torch refuses in other words."""
    torch.save({"ema": Trap(f"touch {tmp_path}/sprung", os.system)}, tmp_path / "model.pt")
    outcome = command("convert", f"source={tmp_path}/model.pt", *GUIDED, f"out={tmp_path}/out")
    assert outcome.code == 2
    assert "holds more than tensors (posix.system)" in outcome.err
    assert not (tmp_path / "sprung").exists()


def test_a_text_is_no_pickle(command, tmp_path):
    """As git leaves in place of a large file."""
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    outcome = command("convert", f"source={tmp_path}/model.bin", *GUIDED, f"out={tmp_path}/out")
    assert outcome.code == 2
    assert "is damaged or not a file of weights" in outcome.err


def test_a_run_is_not_written_over(adm, command, tmp_path):
    arguments = ["convert", f"source={adm}", *GUIDED, f"out={tmp_path}/run"]
    assert command(*arguments).code == 0
    before = (tmp_path / "run" / LAST).read_bytes()
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "already holds a run" in outcome.err
    assert (tmp_path / "run" / LAST).read_bytes() == before
