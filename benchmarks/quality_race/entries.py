"""Who takes part, and with which options.

ours                      src.train experiment=mnist, as it is
diffusers, same network   our network in the loop, optimiser, schedule and average of diffusers' example
lucidrains, same network  our network in the Trainer and GaussianDiffusion of denoising-diffusion-pytorch
diffusers, lucidrains     the same two, each with its own network
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from src.cli import options as samplers_of
from src.errors import UserError

OURS = "ours"
DIFFUSERS, LUCIDRAINS = "diffusers", "lucidrains"
DIFFUSERS_SAME, LUCIDRAINS_SAME = "diffusers, same network", "lucidrains, same network"

EVALUATIONS = 50  # of the network, a sample
SAMPLERS = {  # of the peers
    DIFFUSERS: ("ddim", "ddim_clipped", "dpmsolver++", "dpmsolver++_clipped"),
    LUCIDRAINS: ("ddim",),
}

Options = dict[str, Any]

# Those of the peers are to be made as good as they get: `--try` runs one trial. Samplers that were behind in every
# trial of a network are left out.
TUNED: dict[str, Options] = {
    OURS: {"samplers": ["midpoint"], "overrides": []},
    DIFFUSERS_SAME: {"batch": 32, "lr": 2e-3, "warmup": 100, "samplers": ["ddim_clipped", "dpmsolver++_clipped"]},
    LUCIDRAINS_SAME: {"batch": 32, "lr": 2e-3, "ema_every": 1, "samplers": [*SAMPLERS[LUCIDRAINS]]},
    DIFFUSERS: {
        "batch": 32,
        "lr": 2e-3,
        "warmup": 100,
        "channels": [32, 32, 64],
        "groups": 16,
        "blocks": 1,
        "samplers": ["ddim_clipped", "dpmsolver++_clipped"],
    },
    LUCIDRAINS: {
        "batch": 16,
        "lr": 2e-3,
        "dim": 16,
        "mults": [1, 2, 4],
        "ema_every": 1,
        "samplers": [*SAMPLERS[LUCIDRAINS]],
    },
}
TABLES = {
    "same network": (OURS, DIFFUSERS_SAME, LUCIDRAINS_SAME),
    "each its own network": (OURS, DIFFUSERS, LUCIDRAINS),
}


def with_options(name: str, given: Sequence[str]) -> Options:
    """The options of an entry with some set anew, as key=value; of ours, any setting of src.train, too.

    Raises:
        UserError: for what is no option of the entry, or has a value of another type.
    """
    options = {key: list(value) if isinstance(value, list) else value for key, value in TUNED[name].items()}
    known = [key for key in options if key != "overrides"]
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key in known:
            options[key] = _typed(text, value, type(options[key]))
        elif equals and name == OURS:
            options["overrides"].append(text)
        else:
            raise UserError(f"{text!r} sets no option of {name!r}; give one of {', '.join(known)} as key=value")
    has = SAMPLERS.get(name.partition(",")[0]) or samplers_of("sampler")
    if unknown := [str(sampler) for sampler in options["samplers"] if sampler not in has]:
        raise UserError(f"samplers={unknown[0]} is none of {name!r}; it has {', '.join(has)}")
    return options


def _typed(text: str, value: str, kind: type) -> Any:
    try:
        read = yaml.safe_load(value)
        return float(value) if kind is float else kind(read) if isinstance(read, kind) else _refused(text, kind)
    except (ValueError, yaml.YAMLError):
        return _refused(text, kind)


def _refused(text: str, kind: type) -> Any:
    example = {int: "64", float: "0.001", list: "[32,64]"}[kind]
    raise UserError(f"{text!r} has no value of this option's type; write one such as {example}")


def settings_of(name: str, options: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What a record depends on besides the seed and the race's own settings, as plain values.

    Args:
        overrides: of ours, whose network runs in three entries.

    Raises:
        UserError: for an override that src.train does not take.
    """
    if name in TABLES["each its own network"][1:]:
        return dict(options)
    config = our_configuration(overrides)
    if name != OURS:
        return {**options, "model": config["model"]}
    parts = ("schedule", "objective", "weighting", "density", "loss", "model", "optimizer", "lr_schedule", "augment")
    trainer = {key: config["trainer"][key] for key in ("accumulate_grad_batches", "gradient_clip_norm", "precision")}
    batch = {"batch_size": config["data"]["batch_size"], "flip": config["data"]["flip"]}
    experiment = {part: config[part] for part in parts}
    return {**options, **experiment, "trainer": trainer, "data": batch, "ema": config["callbacks"]["ema"]}


def our_configuration(overrides: Sequence[str], due: int = 10**9) -> dict[str, Any]:
    """Of experiment=mnist on the CPU, with nothing due before the step `due`.

    Raises:
        UserError: for an override that src.train does not take.
    """
    from hydra.errors import HydraException

    from benchmarks.ours import configuration

    try:
        return configuration("experiment=mnist", "trainer=cpu", *overrides, due=due)
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--ours and --try take settings of src.train, and it says: {reason}") from error


def folder_name(name: str) -> str:
    """Of an entry's work."""
    return name.replace(", ", "_").replace(" ", "_")
