"""hydra/sweeper=optuna: a search that counts what is done, goes on after a kill, and prunes by validation loss."""

import json
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import src.training.fit
from src.errors import UserError
from src.search import distribution

SEARCH = ["-m", "hydra/sweeper=optuna", "experiment=smoke", "optimizer.lr=tag(log, interval(1e-4, 1e-2))"]


@pytest.fixture
def search(command, monkeypatch, tmp_path):
    """Runs a search whose jobs return (lr - 1e-3)^2 without training: search(*arguments, sweep=..., dies_at=job)."""
    tried: list[float] = []

    def run(*arguments: str, sweep: str = "sweep", dies_at: int | None = None):
        def fit(config, run_dir: Path, sweep=None) -> float:
            assert not any(run_dir.iterdir()), "a job got the folder of another"
            (run_dir / "config.yaml").write_text("")
            if dies_at is not None and run_dir.name == str(dies_at):
                raise SystemExit(137)
            lr = config["optimizer"]["lr"]
            tried.append(lr)
            if lr > 5e-3:
                raise UserError("training has diverged")
            return (lr - 1e-3) ** 2

        monkeypatch.setattr(src.training.fit, "fit", fit)
        return command("train", *SEARCH, f"hydra.sweep.dir={tmp_path / sweep}", *arguments)

    run.tried = tried
    return run


def results(folder: Path) -> dict:
    return yaml.safe_load((folder / "optimization_results.yaml").read_text())


def jobs(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_a_search_finds_the_best_of_what_it_tried(search, tmp_path):
    outcome = search("hydra.sweeper.n_trials=12")
    assert outcome.code == 0, outcome.err
    assert len(set(search.tried)) == 12
    best = min(search.tried, key=lambda lr: (lr - 1e-3) ** 2)
    found = results(tmp_path / "sweep")
    assert found["best_params"] == {"optimizer.lr": best}
    assert found["best_value"] == (best - 1e-3) ** 2
    assert search.tried[found["best_trial"]] == best
    assert "training has diverged" in outcome.out, "and went on"


def test_a_killed_search_goes_on_as_if_it_had_not_been(search, tmp_path):
    assert search("hydra.sweeper.n_trials=14", sweep="whole").code == 0
    whole = list(search.tried)
    search.tried.clear()
    assert search("hydra.sweeper.n_trials=14", dies_at=11).code == 137
    outcome = search("hydra.sweeper.n_trials=14")
    assert outcome.code == 0, outcome.err
    assert "going on with sweep: 11 of 14 trials are done" in outcome.out
    assert search.tried == whole
    assert jobs(tmp_path / "sweep") == list(range(15)), "job 11 was killed, and run again as job 12"
    assert results(tmp_path / "sweep")["best_params"] == results(tmp_path / "whole")["best_params"]


def test_a_finished_search_is_not_run_again(search, tmp_path):
    assert search("hydra.sweeper.n_trials=2").code == 0
    assert search("hydra.sweeper.n_trials=2").code == 0
    assert len(search.tried) == 2
    assert search("hydra.sweeper.n_trials=3").code == 0
    assert len(search.tried) == 3


def test_a_search_with_other_settings_is_another(search, tmp_path):
    assert search("hydra.sweeper.n_trials=1").code == 0
    outcome = search("hydra.sweeper.n_trials=2", "trainer.max_steps=5")
    assert outcome.code == 2
    assert "holds a search with experiment=smoke, not with experiment=smoke trainer.max_steps=5" in outcome.err
    (tmp_path / "grid" / "0").mkdir(parents=True)
    outcome = search(sweep="grid")
    assert outcome.code == 2
    assert "grid holds jobs of another sweep" in outcome.err


def test_jobs_that_all_fail_end_the_search(search):
    outcome = search("optimizer.lr=interval(0.01, 0.02)")
    assert outcome.code == 2
    assert outcome.err.rstrip().endswith("error: training has diverged")
    assert len(search.tried) == 3


REFUSED = [
    (["metric=null"], "metric=null names none; set metric=val/loss_ema"),
    (["optimizer.lr=1e-3"], "has nothing to search"),
    (["optimizer.lrr=interval(0,1)"], "did you mean optimizer.lr?"),
    (["hydra.sweeper.n_trials=x"], "hydra.sweeper.n_trials=x is not a whole number"),
    (["hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0 must be at least 1"),
    (["hydra.sweeper.sampler.seed=x"], "hydra.sweeper: "),
    (["hydra.sweeper.pruner.n_startup_trials=-1"], "hydra.sweeper.pruner: "),
    (["hydra/sweeper/pruner=medain"], "did you mean hydra/sweeper/pruner=median"),
    (["optimizer.lr='tag(log, interval(0, 1))'"], "low > 0"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_search_that_cannot_be_is_refused_before_any_job(search, tmp_path, arguments, sentence):
    outcome = search(*[a.replace("'", "") for a in arguments])
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert search.tried == []
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_opened(search):
    outcome = search("hydra.sweeper.storage=nonsense://x")
    assert outcome.code == 2
    assert "hydra.sweeper.storage=nonsense://x cannot be opened" in outcome.err
    assert search.tried == []


def test_a_command_without_a_number_has_nothing_to_compare(command, tmp_path):
    outcome = command("preview", "-m", "hydra/sweeper=optuna", "seed=range(0,9)", f"out={tmp_path / 'out'}")
    assert outcome.code == 2
    assert "this command's return none" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_search_is_many_jobs(command):
    outcome = command("train", "hydra/sweeper=optuna")
    assert (outcome.code, outcome.err) == (2, "error: hydra/sweeper=optuna runs many jobs: say so with -m\n")


def test_a_hopeless_trial_is_pruned(command, tmp_path):
    """Real training; the threshold takes the place of a median, which needs more trials."""
    outcome = command(
        *["train", "-m", "hydra/sweeper=optuna", "experiment=smoke", f"hydra.sweep.dir={tmp_path}"],
        *["optimizer.lr=1e-2,1e-7", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=3"],
        *["hydra/sweeper/pruner=none", "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner"],
        *["+hydra.sweeper.pruner.upper=0.95", "trainer.val_every_n_steps=5", "trainer.log_every_n_steps=10"],
    )
    assert outcome.code == 0, outcome.err
    steps = {}
    for job in jobs(tmp_path):
        lr = yaml.safe_load((tmp_path / str(job) / "config.yaml").read_text())["optimizer"]["lr"]
        steps[lr] = json.loads((tmp_path / str(job) / "summary.json").read_text())["steps"]
        assert (tmp_path / str(job) / "checkpoints" / "last.ckpt").exists()
        assert (tmp_path / str(job) / "pruned.txt").exists() == (lr == 1e-7)
    assert steps == {1e-2: 20, 1e-7: 5}
    assert "pruned at step 5: val/loss_ema" in outcome.out
    assert results(tmp_path)["best_params"] == {"optimizer.lr": "0.01"}

    pruned = next(job for job in jobs(tmp_path) if (tmp_path / str(job) / "pruned.txt").exists())
    outcome = command("train", f"run={tmp_path / str(pruned)}", "trainer.max_steps=10")
    assert outcome.code == 0, outcome.err
    assert "10 steps" in outcome.out, "outside its search nothing prunes it"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=interval(1, 12)", "FloatDistribution(high=12.0, log=False, low=1.0, step=None)"),
        ("a=int(tag(log, interval(1, 100)))", "IntDistribution(high=100, log=True, low=1, step=1)"),
        ("a=range(1, 10, 3)", "IntDistribution(high=7, log=False, low=1, step=3)"),
        ("a=range(0.1, 0.5, 0.1)", "FloatDistribution(high=0.4, log=False, low=0.1, step=0.1)"),
        ("a=range(9, 0, -3)", "IntDistribution(high=9, log=False, low=3, step=3)"),
        ("a=1e-4,x,true", "CategoricalDistribution(choices=('0.0001', 'x', 'True'))"),
    ],
)
def test_hydras_sweeps_as_optunas_distributions(override, expected):
    assert str(distribution(OverridesParser.create().parse_override(override))) == expected
