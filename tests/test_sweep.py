"""python -m src.train -m: a folder and, with logger=wandb, an offline W&B run of its own for every job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import joblib
import yaml

from tests.helpers import items, records

ROOT = Path(__file__).resolve().parents[1]


def wandb_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/wandb/offline-run-*/run-*.wandb"))


def test_a_sweep_over_beta_end(command, tmp_path):
    arguments = ["experiment=smoke", "schedule.beta_end=0.01,0.04", f"hydra.sweep.dir={tmp_path}", "logger=wandb"]
    outcome = command("train", "-m", *arguments)
    assert outcome.code == 0, outcome.err
    configs = [yaml.safe_load((tmp_path / job / "config.yaml").read_text()) for job in "01"]
    assert [c["schedule"]["beta_end"] for c in configs] == [0.01, 0.04]
    assert [(tmp_path / job / "summary.json").exists() for job in "01"] == [True, True]
    assert outcome.out.count("wandb sync ") == 2

    files = wandb_runs(tmp_path)
    assert len(files) == 2
    runs = [records(file) for file in files]
    started = [run["run"][0] for run in runs]
    assert {run.run_group for run in started} == {tmp_path.name}
    assert len({run.run_id for run in started}) == 2
    for run in runs:
        assert run["exit"][-1].exit_code == 0
        history = {key for row in run["history"] for key in items(row.item)}
        assert {"train/loss", "val/loss_ema", "samples/_type", "images_per_second"} <= history
        summary = {key for record in run["summary"] for key in items(record.update)}
        assert "parameters" in summary


def test_jobs_in_parallel_processes_share_the_machine(tmp_path):
    """Each job has a GPU of its own (in name: the jobs run on the CPU), and its share of the cores."""
    arguments = [
        *["experiment=smoke", "schedule.beta_end=0.01,0.04", "trainer.max_steps=2", "hydra/launcher=joblib"],
        *["+callbacks.probe._target_=tests.probe.Probe", f"hydra.sweep.dir={tmp_path / 'sweep'}"],
    ]
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    subprocess.run(
        [sys.executable, "-m", "src.train", "-m", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**env, "CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp_path)},
    )
    assert [(tmp_path / "sweep" / job / "summary.json").exists() for job in "01"] == [True, True]
    seen = [json.loads((tmp_path / "sweep" / job / "probe-0.json").read_text()) for job in "01"]
    assert {job["gpu"] for job in seen} == {"0", "1"}
    assert {job["threads"] for job in seen} == {max(1, joblib.cpu_count() // 2)}


def test_one_bad_job_does_not_stop_the_others(command, tmp_path):
    outcome = command("train", "-m", "experiment=smoke", "schedule.beta_end=2,0.02", f"hydra.sweep.dir={tmp_path}")
    assert outcome.code == 2
    assert "beta_end=2 must lie strictly between 0 and 1" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "0").exists()
    assert (tmp_path / "1" / "summary.json").exists()
    (noted,) = (tmp_path / "failed").iterdir()  # for the report
    assert noted.name == "0.json"
    noted = json.loads(noted.read_text())
    assert noted["overrides"] == ["experiment=smoke", "schedule.beta_end=2"]
    assert "beta_end=2 must lie strictly between 0 and 1" in noted["error"]

    again = command("train", "-m", "experiment=smoke", "schedule.beta_end=0.03", f"hydra.sweep.dir={tmp_path}")
    assert again.code == 0
    assert not (tmp_path / "failed").exists()  # job 0 has been mended


def test_the_flag_may_stand_anywhere(command, tmp_path):
    arguments = ["experiment=smoke", "-m", "seed=1", "trainer.max_steps=1", f"hydra.sweep.dir={tmp_path}"]
    assert command("train", *arguments).code == 0
    assert (tmp_path / "0" / "summary.json").exists()


def jobs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.yaml"))


TINY = (
    *("model.hidden_dims=8", "model.time_emb_dim=8", "trainer.max_steps=1", "hydra/launcher=basic", "seed=0"),
    *("callbacks.score.num_samples=65", "callbacks.score.sampler.steps=2"),
)


def test_an_experiment_that_is_a_sweep_runs_with_and_without_the_flag(command, tmp_path):
    """What the command line sets takes the place of what the experiment sweeps; a job is continued alone."""
    for flags, folder in (([], tmp_path / "without"), (["-m"], tmp_path / "with")):
        arguments = ["experiment=lessons/time", *TINY, f"hydra.sweep.dir={folder}"]
        outcome = command("train", *flags, *arguments)
        assert outcome.code == 0, outcome.err
        assert jobs(folder) == ["0", "1"]
        configs = [yaml.safe_load((folder / job / "config.yaml").read_text()) for job in "01"]
        assert [c["model"]["time_conditioning"] for c in configs] == [True, False]
    outcome = command("train", f"run={tmp_path / 'with' / '1'}", "trainer.max_steps=2")
    assert outcome.code == 0, outcome.err
    assert jobs(tmp_path / "with") == ["0", "1"]
    assert "2 steps, 256 images" in outcome.out


def test_an_experiment_that_is_a_sweep_can_be_run_once(command, tmp_path):
    arguments = ["experiment=lessons/time", *TINY, "hydra.mode=RUN", f"hydra.run.dir={tmp_path / 'run'}"]
    outcome = command("train", *arguments)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["time_conditioning"] is True


def test_each_of_several_processes_does_not_sweep_for_itself(command, monkeypatch, tmp_path):
    """Also where the sweep is the experiment's own."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    outcome = command("train", "experiment=lessons/time", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert outcome.code == 2
    assert "would start the whole sweep" in outcome.err


def test_an_option_in_a_folder_is_named_by_its_path(command):
    outcome = command("train", "experiment=lessons/tme")
    assert outcome.code == 2
    assert "there is no option experiment=lessons/tme; did you mean experiment=lessons/time" in outcome.err


def test_several_devices_in_a_sweep_are_refused(command, tmp_path):
    arguments = ["experiment=smoke", "trainer=ddp", "trainer.devices=2", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    outcome = command("train", "-m", *arguments)
    assert outcome.code == 2
    assert "--multirun do not work in one process" in outcome.err
    assert "hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2" in outcome.err
