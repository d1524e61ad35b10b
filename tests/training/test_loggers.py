"""Trackers: what reaches them, and that a missing server never stops a run."""

import socket
import threading
import time

import pytest

from src.training import loggers
from tests.helpers import rows


def test_tensorboard_gets_scalars_pictures_configuration_and_summary(command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("train", "experiment=smoke", "logger=tensorboard", f"hydra.run.dir={tmp_path}").code == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(int(r["step"]), pytest.approx(float(r["train/loss"]), rel=1e-6)) for r in rows(tmp_path)]
    assert [event.step for event in events.Scalars("val/loss_ema")] == [10, 20]
    assert [event.step for event in events.Images("samples")] == [10, 20]
    assert {"config/text_summary", "summary/text_summary"} <= set(events.Tags()["tensors"])


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
