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

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from src.training import wandb_tracker

LAST = 1 - 2**-24  # of float32 below 1


class FakeServer:
    """Answers until GET /switch/hang, after which it accepts and says nothing, or /switch/die, which closes its socket.

    Attributes:
        url: where it listens.
        streams: how often a run sent of what it logged.
        history: the rows that came.
    """

    def __init__(self) -> None:
        self.streams = 0
        self.history: list[dict[str, Any]] = []
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
            lines = (json.loads(body).get("files") or {}).get("wandb-history.jsonl", {"content": []})["content"]
            self.history += [json.loads(line) for line in lines]
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

    The time in which the machine was too busy to run this thread does not count.

    Args:
        out: the file.
        wrong: hang or die, of the server; stall, of the process that W&B starts; or nothing.
        url: of the server.
        after_step: the step.
        finish_seconds: that the run's end then waits for W&B.
    """

    def __init__(self, out: str, wrong: str, url: str, after_step: int, finish_seconds: float) -> None:
        wandb_tracker.FINISH_SECONDS = finish_seconds
        self.out = Path(out)
        self.wrong = wrong
        self.url = url
        self.after_step = after_step
        self.longest = 0.0
        self.before = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        time.sleep(0.02)  # for W&B's own clocks to tick in the time of a test
        if self.before:
            self.longest = max(self.longest, _seconds() - self.before)
        if trainer.global_step == self.after_step:
            while not self._ask("/streams"):  # the run is online
                time.sleep(0.05)
            if self.wrong == "stall":
                os.kill(_service(), signal.SIGSTOP)
            else:
                self._ask(f"/switch/{self.wrong}")
        if trainer.global_step >= self.after_step:
            if self.wrong == "stall":  # more than a socket's buffer holds
                trainer.loggers[1].log_metrics({f"filler/{i}": i / 7 for i in range(500)}, trainer.global_step)
            self.before = _seconds()

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def on_train_end(self, *_: Any) -> None:
        self.out.write_text(str(self.longest))


def _seconds() -> float:
    """A clock that stands still while this thread could run and has no core."""
    queued = Path("/proc/thread-self/schedstat")
    return time.monotonic() - (int(queued.read_text().split()[1]) / 1e9 if queued.exists() else 0.0)


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
