"""How a run is continued: from which checkpoint, and with what of its configuration changed."""

import copy
from typing import Any

from src.errors import UserError
from src.files import shown
from src.launch import rank
from src.overrides import as_override
from src.runs import FORMAT, Run

# What may change when a run is continued; everything else is the experiment.
FREE = (
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps")),
    *(f"trainer.{name}" for name in ("val_every_n_steps", "log_every_n_steps", "compile", "channels_last")),
    *("trainer.deterministic", "trainer.requeue_code", "callbacks.checkpoint", "callbacks.samples", "callbacks.guard"),
    "callbacks.score",
    *("logger", "sampler", "data.dir", "metric", "callbacks.ema.also", "callbacks.ema.snapshot_every_n_steps"),
    "model.gradient_checkpointing",
    "data.workers",
    "data.max_broken",
)
SPLIT = ("data.batch_size", "trainer.accumulate_grad_batches")  # may change when their product stays
UNCOMPARED = ("run", "resume", "overrides", "choices")


def images_per_step(config: dict[str, Any]) -> int:
    """Of all devices and accumulated batches together."""
    sizes = config["data"].get("batch_size"), config["trainer"].get("accumulate_grad_batches")
    return max(1, (sizes[0] or 1) * (sizes[1] or 1))  # what is missing or no number is refused when it is built


def resume_point(run: Run) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a run that was stopped before its first.

    Raises:
        UserError: when there is none that can be continued from.
    """
    checkpoint = run.load_newest()
    if checkpoint is None:
        say(f"{shown(run.folder)} has no checkpoint yet: starting again at step 0")
        return None
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{run.checkpoint} holds weights that no training here made, and nothing to go on from; begin a new run "
            f"with them: {as_override('init_from', shown(run.folder))}"
        )
    if checkpoint["format"] < FORMAT:
        raise UserError(
            f"{run.checkpoint} was written by an older version, whose order of images this one does not know; sample "
            "from it, or train anew"
        )
    return checkpoint


def continued(config: dict[str, Any], run: Run) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a continued run: its own, with what the user changes now; and lines that say what that is.

    Raises:
        UserError: when it is no run's folder, or the user changes what would make it another experiment.
    """
    if not run.in_folder:
        raise UserError(
            f"{run.checkpoint} is not in a run's folder, which is what can be continued; give run=<folder>, or begin a "
            "new run with its weights: init_from=<it>"
        )
    saved = run.config
    started_with = saved["overrides"]
    inherited = config["overrides"][: len(started_with)] == started_with
    given = config["overrides"][len(started_with) :] if inherited else _others(config["overrides"], started_with)
    touched = [override.lstrip("+~").partition("=")[0] for override in given]
    if "experiment" in touched:  # which sets anything
        touched = [key for key in config if key not in UNCOMPARED]
    before, now = _flat(saved), _flat(config)
    lines = []
    merged = copy.deepcopy(saved)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or key.partition(".")[0] in UNCOMPARED or not any(_touches(t, key) for t in touched):
            continue  # a default that has changed since is not the run's
        same_step = key in SPLIT and images_per_step(config) == images_per_step(saved)
        if not same_step and not any(_below(key, free) for free in FREE):
            raise UserError(
                f"{key}={new} is not what this run was started with ({key}={old}); a continued run keeps its experiment"
                f", start a new one to change it"
            )
        missing = _missing(config, key)
        lines.append(
            f"continuing with {key}={new} instead of {old}" if not missing else f"continuing without {missing}"
        )
        _set(merged, key, new, present=key in now)
        if missing:
            _set(merged, missing, None, present=_missing(config, missing) is None)
    if merged["trainer"]["max_steps"] != saved["trainer"]["max_steps"] and "Cosine" in saved["lr_schedule"]["_target_"]:
        lines.append("note: the learning rate's cosine now ends at the new max_steps: it jumps where the run goes on")
    kept = [override for override in given if not override.startswith(("run=", "resume="))]
    return {**merged, "run": str(run.folder), "overrides": [*started_with, *kept]}, list(dict.fromkeys(lines))


def say(text: str) -> None:
    """Prints a line, of the first of several processes."""
    if rank() == 0:
        print(text, flush=True)


def _others(overrides: list[str], known: list[str]) -> list[str]:
    return [override for override in overrides if override not in known]


def _set(node: dict[str, Any], key: str, value: Any, present: bool) -> None:
    """Sets, or removes, the leaf with a dotted name."""
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    if present:
        node[name] = value
    else:
        node.pop(name, None)


def _missing(config: dict[str, Any], key: str) -> str | None:
    """The part of a dotted name whose node a configuration lacks, or has as null, though the name goes on below it."""
    node: Any = config
    *parents, name = key.split(".")
    for i, parent in enumerate(parents):
        node = node.get(parent)
        if not isinstance(node, dict):
            return ".".join(parents[: i + 1])
    return None if name in node else key


def _touches(override: str, key: str) -> bool:
    """Whether an override of a group or a setting has a say in a leaf; a group may be written group@package."""
    override = {"averages": "callbacks.ema"}.get(override, override)  # whose options say their package themselves
    return _below(key, override.partition("@")[2] or override.replace("/", "."))


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith(path + ".")


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()}
