"""A W&B run that training never waits for: whatever goes to it goes through a queue to a thread of its own."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from torch import Tensor

from src.files import link_or_copy, shown
from src.runs import BEST, LAST

QUEUE = 1000  # calls that may wait; when there are more, the newest are dropped
FINISH_SECONDS = 15.0  # that the end of a run waits for W&B to take what it has not got yet,
TEARDOWN_SECONDS = 5.0  # and after that in vain, for W&B's own process to end, twice at most
UPLOAD_BYTES_PER_SECOND = 1e6  # of an artifact; a slower upload is cut off


class WandbTracker(Logger):
    """Hands metrics, images and histograms to a run of W&B; one row of its history a step.

    Args:
        run: that `wandb.init` has begun; nobody else uses it until `finish`.
        artifact: the run folder whose best (or last) checkpoint becomes an artifact of W&B at the end; None for none.
    """

    def __init__(self, run: Any, artifact: Path | None = None) -> None:
        super().__init__()
        self.run = run
        self.artifact = artifact
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE)
        self._dropped = 0
        self._failed = False  # a call was refused
        self._answered = True  # W&B has what the end of the run gave it
        self._exit_code = 0
        self._service = _service_process()
        self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return str(self.run.id)

    @property
    def folder(self) -> Path:
        """Where W&B keeps the run."""
        return Path(self.run.dir).parent

    @property
    def sync_arguments(self) -> str:
        """What `wandb sync` takes; it would pass over a run that began online."""
        return ("" if self.run.offline else "--include-online ") + str(shown(self.folder))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**metrics, "trainer/global_step": step}
        self._later(lambda: self.run.log(row, step=step))

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        """A uint8 image, (C, H, W)."""
        import wandb

        pixels = image.permute(1, 2, 0).numpy()
        self._later(lambda: self.run.log({name: [wandb.Image(pixels)]}, step=step))

    def log_histogram(self, name: str, heights: list[float], edges: list[float], step: int) -> None:
        """The heights of bins and their edges, one more."""
        import wandb

        bins = (np.asarray(heights), np.asarray(edges))
        self._later(lambda: self.run.log({name: wandb.Histogram(np_histogram=bins)}, step=step))

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._later(lambda: self.run.summary.update(summary))

    def finish(self, exit_code: int) -> None:
        """Ends the run, and says how to send later what W&B has not taken in time.

        Takes `FINISH_SECONDS` at most when W&B answers late, an artifact's size over `UPLOAD_BYTES_PER_SECOND` more
        when there is one, and twice `TEARDOWN_SECONDS` more when it does not answer at all.
        """
        self._exit_code = exit_code
        end = time.monotonic() + FINISH_SECONDS
        if checkpoint := self._checkpoint():
            end += checkpoint.stat().st_size / UPLOAD_BYTES_PER_SECOND
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=FINISH_SECONDS)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive() or not self._answered:
            self._give_up()
            print(f"W&B did not answer; later: wandb sync {self.sync_arguments}", flush=True)
        elif self._dropped:
            print(f"W&B was too slow for {self._dropped} calls; metrics.csv has all metrics", flush=True)

    def _later(self, call: Callable[[], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._dropped:
                print("W&B does not keep up, and its run will have gaps; metrics.csv has none", flush=True)
            self._dropped += 1

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                if not self._failed:  # say it once
                    print(f"W&B takes no more ({error}); training goes on", flush=True)
                self._failed = True
        try:
            if checkpoint := self._checkpoint():
                self._log_artifact(checkpoint)
            self.run.finish(exit_code=self._exit_code)
        except Exception:  # of the artifact's upload, of the run's timeout, or of a process of W&B that is no more
            self._answered = False

    def _checkpoint(self) -> Path | None:
        """The file that becomes an artifact, if one is to."""
        if self.artifact is None or self._exit_code:
            return None
        paths = (self.artifact / BEST, self.artifact / LAST)
        return next((path for path in paths if path.is_file()), None)

    def _log_artifact(self, checkpoint: Path) -> None:
        import wandb

        kept = self.folder / "artifact" / checkpoint.name  # `wandb sync` reads it; the run may go on and write another
        kept.parent.mkdir(exist_ok=True)
        kept.unlink(missing_ok=True)
        link_or_copy(checkpoint, kept)
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
        artifact.add_file(str(kept), policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(artifact)
        if not self.run.offline:
            logged.wait(timeout=FINISH_SECONDS + kept.stat().st_size / UPLOAD_BYTES_PER_SECOND)

    def _give_up(self) -> None:
        """Ends W&B's own process, which would keep this one from ending; what it was given is in its file."""
        import wandb

        def teardown() -> None:
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()

        ending = threading.Thread(target=teardown, daemon=True)
        ending.start()
        ending.join(TEARDOWN_SECONDS)
        if ending.is_alive() and self._service is not None:
            self._service.kill()
        self._thread.join(TEARDOWN_SECONDS)


def _service_process() -> Any:
    """The process that W&B has started for this one (a Popen); None where its library hides it elsewhere."""
    import wandb

    connection = getattr(wandb.setup(), "_connection", None)
    return getattr(getattr(connection, "_proc", None), "_process", None)
