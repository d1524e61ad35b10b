"""hydra/sweeper=optuna: the jobs of a sweep as the trials of an optuna study, which is kept in the sweep's folder.

Trial n is job n, in <sweep folder>/<n>. Whoever starts the same command in the same folder after a kill goes on with
the study: what had finished counts, what was running is run again as a new job.

Hydra's own plugin for optuna (1.3.0) is bound to optuna 2, which no longer opens a database with today's SQLAlchemy,
and starts anew at trial 0 each time.
"""

import inspect
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from src.build import build, check, check_arguments
from src.errors import UserError
from src.files import shown
from src.lock import Lock

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

KILLED = "killed"


def register() -> None:
    """Makes the sweeper known to Hydra, which forgets it after a job."""
    Plugins.instance().register(OptunaSweeper)


class OptunaSweeper(Sweeper):
    """Asks a study for settings, runs jobs with them, and tells it the number that each returned.

    conf/hydra/sweeper/optuna.yaml says what each argument is.
    """

    __module__ = f"hydra_plugins.{__name__}"  # Hydra takes plugins from nowhere else

    def __init__(
        self,
        sampler: dict[str, Any],
        pruner: dict[str, Any] | None,
        direction: Literal["minimize", "maximize"],
        storage: str,
        study_name: str,
        n_trials: int,
        n_jobs: int,
        max_failures: int,
        params: dict[str, Any],
    ) -> None:
        self.sampler = sampler
        self.pruner = pruner
        self.direction = direction
        self.storage = storage
        self.study_name = study_name
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.max_failures = max_failures
        self.params = params
        self.config: DictConfig
        self.hydra_context: HydraContext
        self.launcher: Launcher
        self.failures = 0  # in a row

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.returns = inspect.signature(task_function).return_annotation
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs jobs until n_trials have finished.

        Raises:
            UserError: before any job, for what the user can mend; and when max_failures jobs in a row have failed.
        """
        self._check()
        space, fixed = self._space(arguments)
        self.validate_batch_is_legal([[*fixed, *(f"{key}={_example(values)}" for key, values in space.items())]])
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        try:
            study = self._open(folder, fixed)
            OmegaConf.save(self.config, folder / "multirun.yaml")
            todo = self._todo(study)
            if todo < self.n_trials:
                print(f"going on with {study.study_name}: {self.n_trials - todo} of {self.n_trials} trials are done")
            while todo > 0:
                self._run(study, space, fixed, min(todo, self.n_jobs))
                todo = self._todo(study)
            self._report(study, folder)
        finally:
            lock.release()

    def _check(self) -> None:
        compares = "hydra/sweeper=optuna compares a number that each job returns, and "
        if self.returns is None:
            raise UserError(f"{compares}this command's return none; search with src.train")
        if self.config.metric is None:
            raise UserError(f"{compares}metric=null names none; set metric=val/loss_ema")
        settings: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        node = {key: value for key, value in settings.items() if not key.startswith("_")}
        check_arguments(OptunaSweeper, node, "hydra.sweeper")
        check(node, "hydra.sweeper")
        for name in ("n_trials", "n_jobs", "max_failures"):
            if node[name] < 1:
                raise UserError(f"hydra.sweeper.{name}={node[name]} must be at least 1")
        try:
            self._make_sampler(0)
            if self.pruner is not None:
                build(self.pruner, "hydra.sweeper.pruner")
        except TypeError as error:  # optuna hides the types of its arguments from `check`
            raise UserError(f"hydra.sweeper: {error}") from error

    def _space(self, arguments: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
        """What to search by setting, and the overrides that are the same for all jobs."""
        texts = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(texts)
        last = {override.get_key_element(): override for override in overrides}  # of two for a setting, the later
        space = {key: distribution(override) for key, override in last.items() if override.is_sweep_override()}
        if not space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search: give a setting a range, such as "
                "'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
            )
        return space, [str(override.input_line) for key, override in last.items() if key not in space]

    def _open(self, folder: Path, fixed: list[str]) -> "Study":
        """The study, with what a killed search left running put in line again.

        Raises:
            UserError: when it cannot be opened, or is of another search.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=self.storage, study_name=self.study_name, direction=self.direction, load_if_exists=True
            )
        except Exception as error:  # of the database's driver
            reason = str(error).split("\n")[0]
            raise UserError(f"hydra.sweeper.storage={self.storage} cannot be opened: {reason}") from error
        before = study.user_attrs.get("overrides", fixed)
        if before != fixed:
            raise UserError(
                f"{folder} holds a search with {' '.join(before) or 'no other settings'}, not with "
                f"{' '.join(fixed) or 'none'}; give the same settings to go on, or another hydra.sweep.dir"
            )
        if (folder / str(len(study.trials))).exists():
            raise UserError(f"{folder} holds jobs of another sweep; choose another hydra.sweep.dir")
        study.set_user_attr("overrides", fixed)
        for left in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            optuna.Trial(study, left._trial_id).set_user_attr(KILLED, True)
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)
            if left.params:
                study.enqueue_trial(left.params)
        return study

    def _todo(self, study: "Study") -> int:
        done = (t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and KILLED not in t.user_attrs)
        return self.n_trials - sum(1 for _ in done)

    def _run(self, study: "Study", space: dict[str, "BaseDistribution"], fixed: list[str], count: int) -> None:
        trials = [self._ask(study, space) for _ in range(count)]
        first = trials[0].number
        if [trial.number for trial in trials] != list(range(first, first + count)):
            raise UserError(f"another process searches in the study {self.study_name}; choose another hydra.sweep.dir")
        jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        for trial, job in zip(trials, self.launcher.launch(jobs, initial_job_idx=first), strict=True):
            self._tell(study, trial, job)

    def _ask(self, study: "Study", space: dict[str, "BaseDistribution"]) -> "Trial":
        study.sampler = self._make_sampler(sum(KILLED not in t.user_attrs for t in study.get_trials(deepcopy=False)))
        try:
            return study.ask(space)
        except ValueError as error:  # such as choices that differ from those of the trials before
            raise UserError(f"{self.study_name}: {error}; search something else in another hydra.sweep.dir") from error

    def _make_sampler(self, number: int) -> Any:
        """The sampler for one trial, with a seed of its own: what was drawn before it leaves no trace."""
        node = dict(self.sampler)
        if isinstance(node.get("seed"), int):
            node["seed"] += number
        return build(node, "hydra.sweeper.sampler")

    def _tell(self, study: "Study", trial: "Trial", job: JobReturn) -> None:
        """Tells the study how a job has ended.

        Raises:
            Exception: of the job, when it is one of too many that have failed.
        """
        from optuna.trial import TrialState

        from src.training.pruning import PRUNED_AT

        settings = " ".join(f"{key}={value}" for key, value in trial.params.items())
        try:
            value = job.return_value
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"the job returned {value}, which is not a number that a search can compare")
        except Exception as error:
            study.tell(trial, state=TrialState.FAIL)
            self.failures += 1
            if self.failures >= self.max_failures:
                raise
            print(f"trial {trial.number} ({settings}) failed: {error}", flush=True)
            return
        self.failures = 0
        pruned_at = study.get_trials(deepcopy=False)[trial.number].user_attrs.get(PRUNED_AT)
        if pruned_at is None:
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        end = "" if pruned_at is None else f", pruned at step {pruned_at}"
        print(f"trial {trial.number} ({settings}): {self.config.metric} {value:.6g}{end}", flush=True)

    def _report(self, study: "Study", folder: Path) -> None:
        try:
            best = study.best_trial
        except ValueError as error:
            raise UserError(
                f"no trial of the search in {folder} has come to its end; see what its jobs said, raise "
                "hydra.sweeper.n_trials, or choose hydra/sweeper/pruner=none"
            ) from error
        results = {"name": "optuna", "best_params": best.params, "best_value": best.value, "best_trial": best.number}
        OmegaConf.save(OmegaConf.create(results), folder / "optimization_results.yaml")
        settings = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: {settings}: {self.config.metric} {best.value:.6g}, in {shown(folder / str(best.number))}")


def distribution(override: Override) -> "BaseDistribution":
    """What optuna draws from for a setting that is given as choices, a range or an interval."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        kind: Any = (
            IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
        )
        try:
            return kind(value.start, value.end, log="log" in value.tags)
        except ValueError as error:
            raise UserError(f"{override.input_line}: {error}") from error
    numbers = list(value.range()) if isinstance(value, RangeSweep) else []
    if len(numbers) > 1 and not isinstance(numbers[0], float):
        return IntDistribution(min(numbers), max(numbers), step=abs(value.step))
    if len(numbers) > 1:  # in decimal, where 0.1 + 0.2 is 0.3
        ends = [Decimal(str(value.start)), Decimal(str(value.start)) + Decimal(str(value.step)) * (len(numbers) - 1)]
        return FloatDistribution(float(min(ends)), float(max(ends)), step=abs(value.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _example(values: "BaseDistribution") -> Any:
    choices: Sequence[Any] | None = getattr(values, "choices", None)
    return choices[0] if choices else values.low  # type: ignore[attr-defined]
