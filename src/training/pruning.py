"""In a job of a search: reports what validation says to the study, and stops when it is not worth going on."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src.errors import UserError
from src.runs import PRUNED

PRUNED_AT = "pruned_at"  # what a trial knows of it


class Prune(Callback):
    """Stops a trial after a validation that the pruner thinks too little of.

    A run that is continued outside its search has no running trial, and is left alone.

    Args:
        storage, study_name: where the study is.
        trial: number of this job in the study; None for a job that is not of a search.
        metric: a name among what validation logs.
        pruner: optuna's; None reports and never prunes.
    """

    def __init__(self, storage: str, study_name: str, trial: int | None, metric: str, pruner: Any = None) -> None:
        self.storage = storage
        self.study_name = study_name
        self.number = trial
        self.metric = metric
        self.pruner = pruner
        self._trial: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.number is not None:
            self._trial = self._running_trial(self.number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruned = self._trial is not None and self._report(trainer)
        if trainer.strategy.broadcast(pruned):  # by the first process, which alone talks to the study
            trainer.should_stop = True

    def _report(self, trainer: Trainer) -> bool:
        """Whether to stop now."""
        if self.metric not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"metric={self.metric} is not among what validation measures: {names}")
        step, value = trainer.global_step, float(trainer.callback_metrics[self.metric])
        reported = self._trial.storage.get_trial(self._trial._trial_id)
        if reported.state.is_finished():  # by a search that took this job for dead
            self._trial = None
            return False
        if step not in reported.intermediate_values:
            self._trial.report(value, step)
        if step >= trainer.max_steps or not self._trial.should_prune():
            return False
        self._trial.set_user_attr(PRUNED_AT, step)
        sentence = f"pruned at step {step}: {self.metric} {value:.6g} is too far behind other trials of the search"
        print(sentence, flush=True)
        Path(trainer.default_root_dir, PRUNED).write_text(sentence + "\n")
        return True

    def _running_trial(self, number: int) -> Any:
        import optuna
        from sqlalchemy.engine import make_url

        if self.storage.startswith("sqlite:///") and not Path(str(make_url(self.storage).database)).is_file():
            return None  # optuna would make one
        try:
            study = optuna.load_study(study_name=self.study_name, storage=self.storage, pruner=self.pruner)
        except KeyError:
            return None
        if self.pruner is None:
            study.pruner = optuna.pruners.NopPruner()
        running = {trial.number: trial for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING])}
        return optuna.Trial(study, running[number]._trial_id) if number in running else None
