"""Processes that torchrun or srun started: one folder for all, one voice, and as many devices as processes."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.launch import Launch, launched, meeting_point, rank, stamp
from src.training.trainer import TrainerSettings

ROOT = Path(__file__).resolve().parents[1]
TIME = "%Y-%m-%d_%H-%M-%S-%f"
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SRUN = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and no other's: environment(RANK=0)."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "SUBMITIT_")) or name in ("ENVIRONMENT", *TORCHRUN):
            monkeypatch.delenv(name)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def is_time(name: str) -> bool:
    try:
        return bool(datetime.strptime(name, TIME))
    except ValueError:
        return False


def test_a_process_of_its_own(environment):
    environment()
    assert launched() is None
    assert rank() == 0
    assert is_time(stamp(TIME, resumes=True))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,b2", "a1"),
        ("gpu[07-09,12],b2", "gpu07"),
        ("n[3,5-6]", "n3"),
        ("rack2-n[10-12].site", "rack2-n10.site"),
    ],
)
def test_srun_meets_on_the_first_of_its_nodes_and_not_where_it_was_typed(environment, monkeypatch, nodes, first):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    environment(**SRUN, SLURM_LAUNCH_NODE_IPADDR="10.0.0.1", SLURM_STEP_NODELIST=nodes, SLURM_JOB_NODELIST="other")
    address, port = meeting_point()
    assert address == first
    monkeypatch.delenv("MASTER_PORT")
    environment(SLURM_STEP_ID="1")
    assert meeting_point() != (address, port)  # of two steps that run at once


def test_torchrun(environment):
    environment(TORCHELASTIC_RUN_ID="long run/7", **TORCHRUN)
    assert launched() == Launch("torchrun", rank=1, world_size=4, local_rank=1, local_world_size=2, num_nodes=2)
    assert rank() == 1
    assert stamp(TIME, resumes=False) == "long_run_7"


@pytest.mark.parametrize("run_id", ["none", "3f2b1c4e-0000-4000-8000-0123456789ab"])
def test_torchrun_without_a_name_on_one_node_is_named_by_the_start_of_torchrun(environment, run_id):
    environment(TORCHELASTIC_RUN_ID=run_id, **{**TORCHRUN, "WORLD_SIZE": "2"})
    name = stamp(TIME, resumes=False)
    assert is_time(name)
    assert name == stamp(TIME, resumes=False)
    started = datetime.strptime(name, TIME)  # of the parent of this process, in the past but after the machine's start
    assert started < datetime.now()


def test_torchrun_without_a_name_on_two_nodes_is_refused(environment, command):
    environment(TORCHELASTIC_RUN_ID="none", **{**TORCHRUN, "RANK": "0"})
    outcome = command("train", "experiment=smoke")
    assert outcome.code == 2
    assert "--rdzv-id=<name>" in outcome.err
    assert outcome.err.count("\n") == 1


def test_srun(environment):
    environment(**SRUN)
    assert launched() == Launch("srun", rank=3, world_size=4, local_rank=1, local_world_size=2, num_nodes=2)
    assert rank() == 3
    assert stamp(TIME, resumes=False) == "slurm-71"
    environment(SLURM_STEP_ID="2")
    assert stamp(TIME, resumes=False) == "slurm-71.2"
    environment(SLURM_STEP_ID="0", SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="5")
    assert stamp(TIME, resumes=False) == "slurm-70_5"


def test_srun_with_nodes_of_different_sizes_is_refused(environment):
    environment(**{**SRUN, "SLURM_NTASKS": "3"})
    with pytest.raises(UserError, match="not as many on each node"):
        launched()


def test_a_batch_script_without_srun_is_a_process_of_its_own(environment):
    environment(**{k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, ENVIRONMENT="BATCH")
    assert launched() is None
    assert is_time(stamp(TIME, resumes=False))
    assert stamp(TIME, resumes=True) == "slurm-71"
    environment(SUBMITIT_EXECUTOR="slurm")
    assert is_time(stamp(TIME, resumes=True))


def test_a_shell_that_slurm_gave_is_not_a_task(environment, monkeypatch):
    environment(**SRUN, SLURM_JOB_NAME="bash")
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.openpty()[1]))
    assert launched() is None
    assert is_time(stamp(TIME, resumes=True))


def test_devices_and_nodes_are_those_that_were_started(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment(**SRUN)
    settings = TrainerSettings(accelerator="cpu")
    assert (settings.num_devices, settings.num_nodes) == (2, 2)
    with pytest.raises(ValueError, match=r"devices=4 and num_nodes=2 are not what runs: srun started 4 processes, 2 a"):
        TrainerSettings(accelerator="cpu", devices=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"this process sees 1 GPUs; .*--gpus-per-node"):
        TrainerSettings()


def test_a_sweep_is_not_started_by_each_process(environment, command, tmp_path):
    environment(**{**SRUN, "SLURM_PROCID": "0"})
    outcome = command("train", "-m", "experiment=smoke", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert outcome.code == 2
    assert "srun started 4 processes and each would start the whole sweep" in outcome.err
    assert not (tmp_path / "sweep").exists()


def test_only_the_first_process_speaks(environment, command, tmp_path):
    environment(**SRUN)
    outcome = command("train", "experiment=smoke", "schedule.beta_end=x", f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err) == (2, "")
    environment(SLURM_PROCID="0")
    outcome = command("train", "experiment=smoke", "schedule.beta_end=x", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.err.startswith("error: schedule.beta_end=x is not a number")
    assert not (tmp_path / "run").exists(), "the first process takes the folder away, whoever made it"


def test_torchrun_trains_one_run(environment, tmp_path):
    environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "src.train", "experiment=smoke"]
    result = subprocess.run(
        [sys.executable, "-m", *command, "trainer.max_steps=10"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert is_time(run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["images_seen"]) == (2, 320)
    assert result.stdout.count("10 steps, 320 images") == 1
