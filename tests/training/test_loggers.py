"""Trackers: what reaches them, and that a missing server never stops a run."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from src.training import loggers, wandb_tracker
from src.training.wandb_tracker import WandbTracker
from tests.helpers import items, records, rows
from tests.training.fake_wandb import FakeServer, Watch
from tests.warm import start

ROOT = Path(__file__).resolve().parents[2]


PLOTTED = {"train/loss", "train/grad_norm", "train/lr", "images_per_second", "system/memory_bytes", "system/peak_share"}
OWN = ("images_per_second", "system/", "train/loss_by_level/")  # the last: trackers get a histogram


def by_level(row: dict[str, str]) -> list[float]:
    """The bins of metrics.csv; 0 where there is none."""
    return [float(row[f"train/loss_by_level/{i:02}"] or 0) for i in range(20)]


def test_tensorboard_gets_scalars_pictures_configuration_and_summary(command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("train", "experiment=smoke", "logger=tensorboard", f"hydra.run.dir={tmp_path}").code == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(int(r["step"]), pytest.approx(float(r["train/loss"]), rel=1e-6)) for r in rows(tmp_path)]
    assert set(events.Tags()["scalars"]) >= PLOTTED | (rows(tmp_path, OWN)[0].keys() - {"step"})
    assert [event.step for event in events.Scalars("val/loss_ema")] == [10, 20]
    levels = events.Histograms("train/loss_by_level")
    assert [event.step for event in levels] == [5, 10, 15, 20]
    assert levels[0].histogram_value.bucket_limit == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert list(levels[0].histogram_value.bucket) == pytest.approx(by_level(rows(tmp_path)[0]), rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [10, 20]
    assert {"config/text_summary", "summary/text_summary"} <= set(events.Tags()["tensors"])


def test_an_offline_wandb_run_reads_back(command, tmp_path):
    arguments = ["experiment=smoke", "logger=wandb", f"hydra.run.dir={tmp_path}"]
    outcome = command("train", *arguments)
    assert outcome.code == 0, outcome.err
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert f"wandb sync {file.parent}" in outcome.out
    found = records(file)

    config = items(found["run"][0].config.update)
    assert {k: v for k, v in config.items() if k != "_wandb"} == yaml.safe_load((tmp_path / "config.yaml").read_text())

    history = [items(row.item) for row in found["history"]]
    assert [row["_step"] for row in history] == [5, 10, 15, 20]  # one row a step, as in metrics.csv
    for row, written in zip(history, rows(tmp_path, without=()), strict=True):
        assert row.keys() >= PLOTTED
        scalars = {k: float(v) for k, v in written.items() if v and k != "step" and not k.startswith(OWN[-1])}
        assert {k: row[k] for k in scalars} == pytest.approx(scalars, rel=1e-12)
        assert row["train/loss_by_level/_type"] == "histogram"
        assert row["train/loss_by_level/bins"] == pytest.approx([i / 20 for i in range(21)])
        assert row["train/loss_by_level/values"] == pytest.approx(by_level(written), rel=1e-6)  # float32

    pictures = [name for row in history for name in row.get("samples/filenames", [])]
    assert len(pictures) == 2
    with Image.open(file.parent / "files" / pictures[-1]) as small, Image.open(tmp_path / "samples/step=20.png") as big:
        assert (np.asarray(small.convert("L")) == np.asarray(big.convert("L"))[::8, ::8]).all()

    summary = {k: v for record in found["summary"] for k, v in items(record.update).items()}
    final = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"] == pytest.approx(final["metrics"])
    assert {k: summary[k] for k in ("steps", "parameters", "images_seen")} == {
        k: final[k] for k in ("steps", "parameters", "images_seen")
    }
    assert "artifact" not in found


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_the_best_checkpoint_becomes_an_artifact_when_asked(command, tmp_path, monkeypatch, name):
    """The last one where there is no best. What is uploaded later is a file of its own: the run may go on."""
    if name == "last.ckpt":
        monkeypatch.setattr("src.training.wandb_tracker.BEST", Path("checkpoints", "none.ckpt"))
    arguments = ["experiment=smoke", "logger=wandb", "logger.artifact=true", f"hydra.run.dir={tmp_path}"]
    assert command("train", *arguments).code == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (artifact,) = records(file)["artifact"]
    assert (artifact.type, artifact.finalize) == ("model", True)
    (content,) = artifact.manifest.contents
    assert content.path == name
    saved = (tmp_path / "checkpoints" / name).read_bytes()
    assert Path(content.local_path).read_bytes() == saved
    assert content.digest == base64.b64encode(hashlib.md5(saved).digest()).decode()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A user with a key, whose W&B server is at an address that the test chooses."""

    def at(url: str) -> None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", url)

    return at


def test_without_a_network_wandb_works_offline(command, online, tmp_path):
    online("http://127.0.0.1:9")  # nobody listens there
    started = time.monotonic()
    outcome = command("train", "experiment=smoke", "logger=wandb", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "W&B is offline (127.0.0.1 cannot be reached" in outcome.out
    assert "wandb sync" in outcome.out
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert time.monotonic() - started < 60  # a hang, not a speed


def test_behind_a_proxy_the_server_is_not_asked_directly(online, monkeypatch):
    """The proxy knows the way to what this machine cannot reach."""
    online("http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://proxy:3128")
    assert loggers._offline_reason() is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "cannot be reached" in str(loggers._offline_reason())


def test_without_a_key_wandb_works_offline(command, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    outcome = command("train", "experiment=smoke", "logger=wandb", "trainer.max_steps=1", f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    assert "no API key" in outcome.out


def test_a_key_is_found_in_netrc(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.example.org login user password key\n")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(netrc))
    assert loggers._has_api_key("api.example.org")
    assert not loggers._has_api_key("api.wandb.ai")


def test_a_resumed_run_keeps_its_wandb_run(command, tmp_path):
    arguments = ["experiment=smoke", "logger=wandb", f"hydra.run.dir={tmp_path}"]
    assert command("train", *arguments, "trainer.max_steps=5").code == 0
    first = (tmp_path / loggers.WANDB_ID).read_text()
    assert command("train", f"run={tmp_path}", "trainer.max_steps=10").code == 0
    assert (tmp_path / loggers.WANDB_ID).read_text() == first
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{first.strip()}.wandb"}


def test_a_server_that_accepts_and_says_nothing_does_not_hold_up_a_run(command, online, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setattr(wandb.Settings, "__init__", _short_timeout(wandb.Settings.__init__))
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        outcome = command(
            "train", "experiment=smoke", "logger=wandb", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}"
        )
    assert outcome.code == 0, outcome.err
    assert "W&B is offline" in outcome.out


def _short_timeout(init):
    def patched(self, *args, **settings):
        if "init_timeout" in settings:
            settings["init_timeout"] = 3
        init(self, *args, **settings)

    return patched


class SlowRun:
    """A run of W&B whose first call takes until it is let go."""

    id, dir, offline = "slow", "runs/slow/files", True

    def __init__(self):
        self.go, self.logged, self.code = threading.Event(), [], None

    def log(self, row, step):
        self.go.wait()
        self.logged.append(step)

    def finish(self, exit_code):
        self.code = exit_code


def test_a_queue_that_is_full_drops_the_newest_and_says_so_once(capsys, monkeypatch):
    monkeypatch.setattr(wandb_tracker, "QUEUE", 5)
    run = SlowRun()
    tracker = WandbTracker(run)
    for step in range(20):
        tracker.log_metrics({"a": 1.0}, step)
        if step == 0:
            while tracker._calls.qsize():  # the thread has taken the first
                time.sleep(0.001)
    assert capsys.readouterr().out.count("W&B does not keep up") == 1
    run.go.set()
    tracker.finish(0)
    assert run.logged == [0, 1, 2, 3, 4, 5]
    assert run.code == 0
    assert "too slow for 14 calls" in capsys.readouterr().out


def test_a_run_that_refuses_stops_nothing(capsys):
    run = SlowRun()
    run.log = lambda row, step: 1 / 0
    tracker = WandbTracker(run)
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.log_metrics({"a": 1.0}, 2)
    tracker.finish(3)
    assert run.code == 3
    assert capsys.readouterr().out.count("W&B takes no more") == 1


@pytest.mark.parametrize("wrong", ["hang", "die", "stall"])
def test_training_does_not_wait_for_wandb(tmp_path, record, wrong):
    """The server hangs or dies, or W&B's own process stops, in mid-run: no step waits a second, and the run ends."""
    run, longest, output = tmp_path / "run", tmp_path / "longest", tmp_path / "output"
    with FakeServer() as server:
        watch = {"out": longest, "wrong": wrong, "url": server.url, "after_step": 5, "finish_seconds": 4.0}
        arguments = [
            *("experiment=smoke", "logger=wandb", "trainer.max_steps=40", "trainer.log_every_n_steps=1"),
            *("callbacks.samples.num_samples=1", "callbacks.checkpoint.every_n_steps=40"),
            "trainer.val_every_n_steps=40",
            f"+callbacks.watch._target_={Watch.__module__}.Watch",
            *(f"+callbacks.watch.{name}={value}" for name, value in watch.items()),
        ]
        others = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # this process's own
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        os.mkfifo(output)
        reader = subprocess.Popen(["cat", output], stdout=subprocess.PIPE, text=True)
        process = start(*arguments, f"hydra.run.dir={run}", output=output, env={**others, **online})
        out, _ = reader.communicate(timeout=120)  # until whatever the run started has closed it
        process.join()
    assert process.exitcode == 0, out
    assert float(longest.read_text()) < 1.0
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 41))
    said = re.search(r"W&B did not answer; later: wandb (sync --include-online (.*))\n", out)
    assert said is not None
    assert list(Path(said[2]).glob("run-*.wandb"))
    if wrong != "stall":  # a process that was stopped has written nothing
        with FakeServer() as server:
            sync = [sys.executable, "-m", "wandb", *said[1].split()]
            environment = {**others, **online, "WANDB_BASE_URL": server.url}
            subprocess.run(sync, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
        assert {row["_step"] for row in server.history} == set(range(1, 41))
    faults = {"hang": "W&B server hangs", "die": "W&B server dies", "stall": "W&B's own process stops"}
    record(f"{faults[wrong]} in mid-run", tried=1, lost=0, note=f"longest step {float(longest.read_text()):.2f} s")
