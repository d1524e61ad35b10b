"""Every YAML composes, passes the schema and builds; the experiments say what their papers say."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from src.build import build, check, check_arguments
from src.cli import CONF, options
from src.runs import build_diffusion, build_net
from src.train import TrainConfig

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = [(group, option) for group in GROUPS for option in options(group)]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
NEEDED = {
    "data=packed": ("data.dir=data", "data.channels=1", "data.image_size=8", "data.num_classes=1"),  # of a store
    "schedule=tabulated": ("schedule.betas=[0.1,0.2,0.4]",),
}
NOT_BUILT_ALONE = ("averages", "callbacks", "logger", "experiment", "guidance", "features", "task")


def configuration(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_passes_the_schema_and_builds(experiment):
    config = configuration(f"experiment={experiment}")
    check_arguments(TrainConfig, config, "")
    check(config, "")
    net = build_net(config)
    build(config["task"], "task", config=config).check(net)
    if config["schedule"] is not None:
        diffusion = build_diffusion(config)
        for sampler in (config["sampler"], config["callbacks"]["samples"]["sampler"]):
            build(sampler, "sampler").path(diffusion.schedule)
    for part in ("optimizer", "lr_schedule", "data"):
        build(config[part], part)


@pytest.mark.parametrize(
    ("overrides", "whole"),
    [
        (["weighting=sigmoid"], None),
        (["weighting=sigmoid", "density=logit_normal"], "weighting Sigmoid"),
        (["loss=vlb", "model.learned_variance=true", "density=log_normal"], "loss Vlb"),
        (["loss=vlb", "model.learned_variance=true", "density=importance"], None),
    ],
)
def test_what_would_weigh_twice_is_noted(overrides, whole):
    """Catches a density that is part of a loss which is an integral already (Kingma & Gao 2023 divide by it)."""
    config = configuration("objective=eps", *overrides)
    data = SimpleNamespace(flip=False, augment=build(config["augment"], "augment"))
    notes = build(config["task"], "task", config=config).notes(data)
    found = [note for note in notes if "is the whole weight of a noise level" in note]
    assert [note.startswith(f"note: the {whole} is") for note in found] == ([True] if whole else [])


@pytest.mark.parametrize(("weighting", "noted"), [("constant", False), ("min_snr", True), ("p2", True)])
def test_pure_noise_without_weight_is_noted(weighting, noted):
    """Catches Min-SNR's weight at an SNR of nought, which leaves the start of sampling untrained (Lin et al. 2023)."""
    config = configuration("objective=v", "schedule.zero_terminal_snr=true", f"weighting={weighting}")
    data = SimpleNamespace(flip=False, augment=build(config["augment"], "augment"))
    notes = build(config["task"], "task", config=config).notes(data)
    assert any("gives no weight to pure noise" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["data=folder"], True),
        (["data=folder", "trainer.max_steps=9"], False),
        (["data=folder", "experiment=images"], False),
        (["model=unet_tiny"], False),
    ],
)
def test_a_set_of_ones_own_is_not_trained_by_the_recipe_of_the_digits_unsaid(overrides, noted):
    config = configuration(*overrides)
    data = SimpleNamespace(flip=False, augment=build(config["augment"], "augment"))
    notes = build(config["task"], "task", config=config).notes(data)
    assert any("as in experiment=digits, 1,000 steps" in note for note in notes) == noted


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] not in NOT_BUILT_ALONE])
def test_every_option_passes_the_schema_and_builds(group, option, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # trainer=fsdp needs several
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    size = ["data.image_size=32"] if group == "model" and option != "oracle" else []
    config = configuration(f"{group}={option}", *size, *NEEDED.get(f"{group}={option}", ()))
    check(config, "")
    with torch.device("meta" if size else "cpu"):  # the largest networks take gigabytes
        build(config[group], group)


@pytest.mark.parametrize(
    ("averages", "names"),
    [
        ("none", []),
        ("half_life", ["half_life_500k"]),
        ("edm2", ["power_050", "power_100"]),
        ("[half_life,edm2]", ["half_life_500k", "power_050", "power_100"]),
    ],
)
def test_averages_build_and_go_together(averages, names, tmp_path):
    """With the run's own primary average; 32 snapshots, in images where the training is in images."""
    node = configuration("experiment=digits", f"averages={averages}")["callbacks"]["ema"]
    check(node, "")
    ema = build(node, "callbacks.ema", run_dir=tmp_path)
    assert list(ema.averages) == ["ema", *names]
    assert ema.averages["ema"].decay == 0.99
    assert ema.snapshot_every_n_steps == (31 if "power_050" in names else None)
    if names[-1:] == ["power_100"]:
        images = configuration(f"averages={averages}", "trainer.max_steps=200Mimg")
        assert images["callbacks"]["ema"]["snapshot_every_n_steps"] == "6250000img"


@cache
def option_alone(group: str, option: str) -> dict:
    return configuration(f"{group}={option}", *NEEDED.get(f"{group}={option}", ()))[group]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_part_of_an_experiment_can_be_replaced(experiment):
    """Experiments set only keys that every option of the group has, so any option can take another's place."""
    for name in chain(experiment):
        settings = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
        for group in settings.keys() & set(GROUPS):
            for option in (option for g, option in OPTIONS if g == group):
                known = flat(option_alone(group, option))
                assert flat(settings[group]).keys() <= known.keys(), (name, group, option)


def chain(experiment: str) -> list[str]:
    """The experiment, and those that it builds on."""
    defaults = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").get("defaults", [])
    below = [chain(entry.removeprefix("/experiment/")) for entry in defaults if isinstance(entry, str)]
    return [experiment, *(name for names in below for name in names)]


def flat(node: dict, path: str = "") -> dict:
    items = ((f"{path}.{key}", value) for key, value in node.items())
    return {
        k: v for key, value in items for k, v in (flat(value, key) if isinstance(value, dict) else {key: value}).items()
    }


def test_no_yaml_is_without_a_test():
    paths = [path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")]
    assert sorted(f"{group}/{option}" for group, option in OPTIONS) == sorted(
        path for path in paths if "/" in path and not path.startswith("hydra/")
    )


@pytest.mark.parametrize("path", sorted((CONF / "hydra" / "sweeper").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_option_of_a_search_builds(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    check(node, "")
    build(node, "")


def test_cifar10_is_ho_et_al_to_the_letter():
    config = configuration("experiment=cifar10")
    assert sum(p.numel() for p in build_net(config).parameters()) == 35_746_307
    schedule = {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "zero_terminal_snr": False}
    assert config["schedule"] == {"_target_": "src.diffusion.schedules.Linear", **schedule}
    assert config["objective"]["_target_"] == "src.diffusion.objectives.Eps"
    assert config["weighting"]["_target_"] == "src.diffusion.weightings.Constant"
    assert config["density"]["_target_"] == "src.diffusion.densities.Uniform"
    model = config["model"]
    assert (model["base_channels"], model["channel_mults"], model["num_res_blocks"]) == (128, [1, 2, 2, 2], 2)
    assert (model["attention_resolutions"], model["num_heads"], model["middle_attention"]) == ([16], 1, True)
    assert (model["dropout"], model["patch_size"]) == (0.1, 1)
    optimizer = config["optimizer"]
    assert (optimizer["_target_"], optimizer["lr"], optimizer["eps"]) == ("torch.optim.Adam", 2e-4, 1e-8)
    assert optimizer["weight_decay"] == 0
    assert config["lr_schedule"] == {"_target_": "src.training.lr.Constant", "warmup_steps": 5000}
    trainer = config["trainer"]
    assert (trainer["max_steps"], trainer["gradient_clip_norm"], trainer["accumulate_grad_batches"]) == (
        800_000,
        1.0,
        1,
    )
    assert config["callbacks"]["ema"]["decay"] == 0.9999
    data = config["data"]
    assert (data["batch_size"], data["flip"], data["channels"], data["image_size"]) == (128, True, 3, 32)


def test_tutorial_is_the_tutorials():
    config = configuration("experiment=tutorial")
    model = config["model"]
    assert model["_target_"] == "src.models.simple_unet.SimpleUNet"
    assert (model["hidden_dims"], model["time_emb_dim"]) == (64, 256)
    assert (model["skip_connections"], model["time_conditioning"]) == (True, True)
    assert (config["schedule"]["num_timesteps"], config["schedule"]["beta_start"]) == (1000, 1e-4)
    assert (config["schedule"]["beta_end"], config["optimizer"]["_target_"]) == (0.02, "torch.optim.Adam")


def test_tutorial_digits_is_the_tutorial_at_half_the_width():
    config, tutorial = configuration("experiment=tutorial_digits"), configuration("experiment=tutorial")
    assert (config["model"]["hidden_dims"], config["model"]["time_emb_dim"]) == (32, 128)
    for part in ("schedule", "objective", "weighting", "density", "loss", "optimizer", "lr_schedule"):
        assert config[part] == tutorial[part], part


def test_the_default_experiment_keeps_the_linear_schedule():
    config = configuration("schedule.beta_end=0.04")
    assert config["name"] == "digits"
    assert config["schedule"]["beta_end"] == 0.04


def test_a_run_folder_is_named_by_experiment_and_time():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=smoke"], return_hydra_config=True)
    assert Path(config.hydra.run.dir).parts[:2] == ("outputs", "smoke")
    assert Path(config.hydra.sweep.dir).parts[:3] == ("outputs", "multirun", "smoke")


@pytest.mark.parametrize(("resume", "name"), [("auto", "slurm-7"), ("null", None)])
def test_a_job_of_slurm_that_resumes_is_named_by_it_wherever_that_is_said(monkeypatch, resume, name):
    """Catches resume=auto that counts as an argument alone, and not in an experiment's file."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=smoke", f"++resume={resume}"], return_hydra_config=True)
    folder = Path(config.hydra.run.dir).name
    assert folder == name if name else folder.startswith("20")


@pytest.mark.parametrize(
    "name", ["train", "sample", "edit", "preview", "evaluate", "ema", "convert", "export", "report"]
)
def test_help_names_the_groups_that_the_command_takes(command, name):
    """Catches a --help that offers groups which the command then refuses."""
    outcome = command(name, "--help")
    assert outcome.code == 0, outcome.err
    offered = {line.partition(":")[0] for line in outcome.out.splitlines()} & set(GROUPS)
    defaults = OmegaConf.load(CONF / ("train.yaml" if name in ("preview", "convert") else f"{name}.yaml")).defaults
    taken = {next(iter(entry)) for entry in defaults if OmegaConf.is_dict(entry)} & set(GROUPS)
    assert offered == taken
    assert outcome.out.partition("Examples:")[2].count(f"python -m src.{name}") >= 3
