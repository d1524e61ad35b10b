"""A W&B server of just enough answers for an online run, which stops answering in mid-run; and what watches a run."""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src.training.metrics import LossByLevel

LAST = 1 - 2**-24  # of float32 below 1


class FakeServer:
    """Answers until GET /switch/hang, after which it accepts and says nothing, or /switch/die, which closes its socket.

    Attributes:
        url: where it listens.
        streams: how often a run sent of what it logged.
    """

    def __init__(self) -> None:
        self.streams = 0
        self.mode = "answers"
        self._ended = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fake.mode == "hang":
                    fake._ended.wait()
                self.close_connection = fake.mode != "answers"
                if self.close_connection:
                    return
                answer = json.dumps(fake.reply(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                if self.path.startswith("/switch/"):
                    fake.mode = self.path.rpartition("/")[2]
                    if fake.mode == "die":
                        fake.server.socket.close()

            do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that have left
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # when its socket is closed
            self.server.serve_forever(poll_interval=0.05)

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self.server.server_close()

    def reply(self, path: str, body: bytes) -> Any:
        if path.endswith("/file_stream"):
            self.streams += 1
        if path == "/streams":
            return self.streams
        if path != "/graphql":
            return {}
        variables = json.loads(body).get("variables") or {}
        project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": variables.get("name") or "r", "displayName": "r", "config": "{}"}
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables.get("files") or []]
        data = {
            "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "model": None,
            "upsertBucket": {"bucket": {**bucket, "project": project, "historyLineCount": 0}, "inserted": True},
            "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files},
        }
        return {"data": data}


class Watch(Callback):
    """Has something go wrong after a step, and writes the longest time between two steps since then to a file.

    Args:
        out: the file.
        wrong: hang or die, of the server; stall, of the process that W&B starts; or nothing.
        url: of the server.
        after_step: the step.
    """

    def __init__(self, out: str, wrong: str, url: str, after_step: int) -> None:
        self.out = Path(out)
        self.wrong = wrong
        self.url = url
        self.after_step = after_step
        self.longest = 0.0
        self.before = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        time.sleep(0.02)  # for W&B's own clocks to tick in the time of a test
        if self.before:
            self.longest = max(self.longest, time.monotonic() - self.before)
        if trainer.global_step == self.after_step:
            while not self._ask("/streams"):  # the run is online
                time.sleep(0.05)
            if self.wrong == "stall":
                os.kill(_service(), signal.SIGSTOP)
            else:
                self._ask(f"/switch/{self.wrong}")
        if trainer.global_step >= self.after_step:
            for logger in trainer.loggers[1:]:  # more than a socket's buffer holds
                logger.log_metrics({f"filler/{i}": i / 7 for i in range(500)}, trainer.global_step)
            self.before = time.monotonic()

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def on_train_end(self, *_: Any) -> None:
        self.out.write_text(str(self.longest))


class Levels(Callback):
    """Adds a loss of 1 + step at u = 0.03 and two of 3 at the last level below 1, each step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.loss_by_level.add(torch.tensor([0.03, LAST, LAST]), torch.tensor([1.0 + trainer.global_step, 3, 3]))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.loss_by_level = LossByLevel()


def _service() -> int:
    """The number of the W&B process that this process started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (folder / "stat").read_text().rsplit(")", 1)
        except OSError:
            continue
        if name.partition("(")[2].startswith("wandb-core") and int(fields.split()[1]) == os.getpid():
            return int(folder.name)
    raise AssertionError("W&B has no process of its own")
