"""What this project makes of Hydra's launchers for jobs side by side."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from omegaconf import OmegaConf

from src.devices import gpus

MAX_REQUEUES = 1000  # of a submitit job whose time was up; with resume=auto each goes on


class DeviceLauncher(JoblibLauncher):
    """Joblib's, with as many jobs at a time as there are GPUs, or CPU cores, or jobs, unless n_jobs says otherwise.

    Joblib gives each job cores / n_jobs threads. Two jobs with all cores each slow each other down many times over.
    """

    __module__ = f"hydra_plugins.{__name__}"  # Hydra takes plugins from nowhere else

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import joblib

        n_jobs = self.joblib["n_jobs"]
        if n_jobs == -1:
            n_jobs = len(gpus()) or joblib.cpu_count()
        self.joblib["n_jobs"] = max(1, min(n_jobs, len(job_overrides))) if n_jobs > 0 else n_jobs
        return super().launch(job_overrides, initial_job_idx)


def register() -> None:
    """Puts these in the place of the plugins' own, in Hydra's store, which is filled anew after each job."""
    plugins = Plugins.instance()
    plugins.register(DeviceLauncher)
    _change("joblib", _target_=f"{DeviceLauncher.__module__}.{DeviceLauncher.__name__}")
    _change("submitit_slurm", max_num_timeout=MAX_REQUEUES)


def _change(launcher: str, **settings: Any) -> None:
    store = ConfigStore.instance()
    node = store.load(f"hydra/launcher/{launcher}.yaml").node
    store.store(launcher, OmegaConf.merge(node, settings), group="hydra/launcher", provider="src")
