"""Jobs of a cluster, with the Slurm of tests/slurm.py: one folder for all tasks, and what is requeued goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import slurm
from tests.warm_python import interpreter

ROOT = Path(__file__).resolve().parents[1]
HANGS = 300  # seconds; a job that died without a word would be waited for without end
SMOKE = ["experiment=smoke", "trainer.max_steps=10", "trainer.val_every_n_steps=10", "callbacks.samples=null"]


@pytest.fixture
def cluster(tmp_path):
    """An environment for subprocesses with the commands of Slurm on its PATH, its state's folder, and its first id."""
    state, first = slurm.install(tmp_path / "bin")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    with interpreter(tmp_path / "warm") as python:
        path = f"{tmp_path / 'bin'}:{python.parent}:{kept['PATH']}"
        yield {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, state, first


def train(env: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    python = shutil.which("python", path=env["PATH"])
    command = [python, "-m", "src.train", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANGS)


def steps(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def time_is_up(number: int) -> list[str]:
    return [
        "+callbacks.mine._target_=tests.probe.TimeIsUp",
        f"+callbacks.mine.number={number}",
        "+callbacks.mine.step=4",
    ]


def has_slurm() -> bool:
    """Whether this machine is part of a real cluster."""
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.parametrize("kind", ["small", "real"])
def test_srun_makes_one_run(cluster, tmp_path, kind):
    env, _, first = cluster
    if kind == "real":
        if not has_slurm():
            pytest.skip("there is no Slurm here")
        python = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["srun", "-n", "2", "python", "-m", "src.train", *SMOKE]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert run.name == f"slurm-{first}" or kind == "real"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert result.stdout.count("10 steps, 320 images") == 1


def test_a_batch_job_whose_time_is_up_is_requeued_and_goes_on(cluster, tmp_path):
    env, state, first = cluster
    arguments = [*SMOKE, *time_is_up(signal.SIGUSR1)]
    subprocess.run(
        ["sbatch", "--output=log", str(ROOT / "docs" / "slurm.sh"), *arguments], cwd=tmp_path, env=env, check=True
    )
    while not (state / f"{first}.exit").exists():
        time.sleep(0.2)
    log = (tmp_path / "log").read_text()
    assert (state / f"{first}.exit").read_text() == "0", log
    assert (state / f"{first}.attempts").read_text() == "2"
    (run,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert run.name == f"slurm-{first}"
    assert "stopped by SIGUSR1 after step 4" in log
    assert steps(run) == 10


def test_a_submitit_job_whose_time_is_up_is_requeued_and_goes_on(cluster, tmp_path):
    env, state, first = cluster
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.sweep.dir=sweep"]
    result = train(env, tmp_path, "-m", *launcher, *SMOKE, "resume=auto", "seed=0,1", *time_is_up(signal.SIGUSR2))
    logs = "\n".join(path.read_text() for path in (tmp_path / "sweep" / ".submitit").rglob("*_log.*"))
    assert result.returncode == 0, result.stderr + logs
    assert [(state / f"{job}.attempts").read_text() for job in (first, first + 1)] == ["2", "1"]
    assert "stopped by SIGUSR2 after step 4" in logs
    assert [steps(tmp_path / "sweep" / job) for job in "01"] == [10, 10]


def test_a_sweep_of_jobs_of_several_processes(cluster, tmp_path):
    """-m with ddp, refused in one process, works where each job is a group of tasks."""
    env, _, _ = cluster
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.sweep.dir=sweep"]
    result = train(env, tmp_path, "-m", *launcher, *SMOKE, "trainer=ddp", "trainer.accelerator=cpu")
    logs = "\n".join(path.read_text() for path in (tmp_path / "sweep" / ".submitit").rglob("*_log.*"))
    assert result.returncode == 0, result.stderr + logs
    assert json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())["world_size"] == 2
    assert steps(tmp_path / "sweep" / "0") == 10
