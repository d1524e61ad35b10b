"""Trackers beside metrics.csv. Each function makes the Lightning logger of one option of conf/logger."""

import netrc
import os
import secrets
import socket
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from src.errors import UserError
from src.files import tolerated
from src.training.wandb_tracker import FINISH_SECONDS, WandbTracker

WANDB_ID = "wandb_id.txt"


def none(run_dir: Path, config: dict[str, Any], group: str | None) -> None:
    """No tracker; metrics.csv is written whatever is chosen."""


def tensorboard(run_dir: Path, config: dict[str, Any], group: str | None) -> Logger:
    """TensorBoard event files in <run>/tensorboard."""
    return TensorBoardLogger(save_dir=run_dir, name="tensorboard", version="")


def wandb(
    run_dir: Path,
    config: dict[str, Any],
    group: str | None,
    project: str = "diffusion-lab",
    entity: str | None = None,
    tags: list[str] | tuple[str, ...] = (),
    artifact: bool = False,
) -> Logger | None:
    """A W&B run of its own, in the sweep's group; offline, with how to sync, when there is no key or no network.

    The run's id is kept in the run's folder, so that a resumed run continues the same W&B run.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration, which W&B shows.
        group: the sweep that the run belongs to.
        project: of W&B.
        entity: user or team of W&B; None for the key's own.
        tags: of the run.
        artifact: whether the best checkpoint goes to W&B at the end.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its last report can hold up a process for half a minute
    import wandb as wb

    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    id_file = run_dir / WANDB_ID
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)

    bounded: dict[str, Any] = {"finish_timeout": FINISH_SECONDS - 2, "finish_timeout_raises": True}
    if not bounded.keys() <= wb.Settings.model_fields.keys():
        bounded = {}  # an older W&B; the tracker gives up on it by itself

    def start(mode: Literal["online", "offline"]) -> Any:
        return wb.init(
            project=project,
            entity=entity,
            group=group,
            tags=list(tags),
            name=f"{config['name']}/{run_dir.name}",
            id=run_id,
            resume="allow",
            dir=run_dir,
            config=config,
            mode=mode,
            settings=wb.Settings(init_timeout=30, console="off", silent=True, **bounded),
        )

    offline = _offline_reason()
    try:
        run = start("offline" if offline else "online")
    except wb.errors.CommError as error:  # the server is there, and does not answer
        offline = " ".join(str(error).split())
        wb.teardown()  # the attempt still holds the run's id
        run = start("offline")
    except wb.errors.Error as error:
        raise UserError(f"W&B refuses to start ({error}); use logger=none, or WANDB_MODE=offline") from error
    with tolerated(id_file):
        id_file.write_text(run_id + "\n")
    tracker = WandbTracker(run, run_dir if artifact else None)
    if offline:
        print(f"W&B is offline ({offline}); later: wandb sync {tracker.sync_arguments}", flush=True)
    return tracker


def finish_wandb(loggers: list[Logger], exit_code: int) -> None:
    """Ends W&B's run, if there is one, so that the next job of a sweep begins its own."""
    for logger in loggers:
        if isinstance(logger, WandbTracker):
            logger.finish(exit_code)


def log_image(logger: Logger, name: str, image: Tensor, step: int) -> None:
    """Hands a uint8 image, (C, H, W), to a tracker that takes images."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step)
    elif isinstance(logger, WandbTracker):
        logger.log_image(name, image, step)


def log_histogram(logger: Logger, name: str, heights: Tensor, step: int) -> None:
    """Hands the heights of equal bins of [0, 1], (bins,), to a tracker that takes histograms."""
    edges = torch.linspace(0, 1, len(heights) + 1, dtype=torch.float64)
    if isinstance(logger, TensorBoardLogger):
        middles = (edges[1:] + edges[:-1]) / 2
        logger.experiment.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=len(heights),
            sum=float(heights.double() @ middles),
            sum_squares=float(heights.double() @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )
    elif isinstance(logger, WandbTracker):
        logger.log_histogram(name, heights.tolist(), edges.tolist(), step)


def log_summary(logger: Logger, summary: dict[str, Any]) -> None:
    """Hands the run's summary to a tracker."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("summary", "\n".join(f"    {k}: {v}" for k, v in summary.items()))
        logger.experiment.flush()  # training is over, and with it Lightning's own flushing
    elif isinstance(logger, WandbTracker):
        logger.log_summary(summary)


def log_config(logger: Logger, config: dict[str, Any]) -> None:
    """Hands the configuration to a tracker that has not got it yet."""
    if isinstance(logger, TensorBoardLogger):
        from omegaconf import OmegaConf

        logger.experiment.add_text(
            "config", "\n".join(f"    {line}" for line in OmegaConf.to_yaml(config).splitlines())
        )


def _offline_reason() -> str | None:
    """Why W&B cannot be online; None when it can. Takes three seconds at most."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    if not _has_api_key(host):
        return "no API key: set WANDB_API_KEY or run `wandb login`"
    proxied = getproxies().get(url.scheme) and not proxy_bypass(host)
    if os.environ.get("WANDB_MODE") == "online" or proxied:  # the user, or the proxy, knows the way
        return None
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return f"{host} cannot be reached: {error}"
    return None


def _has_api_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
