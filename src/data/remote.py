"""A file behind a URL, read from front to end; where the connection breaks, the rest is asked for."""

import io
import time
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT = 60  # seconds without a byte
WAITS = (1, 5, 25)  # seconds before it is asked for again
BUSY = (408, 429)  # beside 500 and above: answers of a server that may give another later


class NoRestError(OSError):
    """The server has only the whole file to give."""


class Remote(io.RawIOBase):
    """Bytes as they come, and all of them: of a file that changes between two connections nothing more is read.

    Raises:
        OSError: (urllib's errors are such) at once, when the server refuses, was never there, or cannot give the rest;
            after the last of WAITS, which begin anew with every byte that comes, when it is busy, gone or silent.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        self._version: str | None = None
        self._size: str | None = None
        self._response: HTTPResponse | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for wait in (*WAITS, None):
            try:
                if self._response is None:
                    self._response = self._ask()
                came = self._response.read1(len(buffer))
                missing = self._response.length  # None where the server does not say
                if not came and missing:
                    raise ConnectionError(f"the connection ended {missing:,} bytes early")
                buffer[: len(came)] = came
                self._at += len(came)
                return len(came)
            except (OSError, HTTPException) as error:
                self._hang_up()
                if wait is None or not self._may_pass(error):
                    raise error if isinstance(error, OSError) else OSError(repr(error)) from error
                time.sleep(wait)
        raise AssertionError("the last round returns or raises")

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _ask(self) -> HTTPResponse:
        request = Request(self._url)
        if self._at:
            request.add_header("Range", f"bytes={self._at}-")
            if self._version is not None:
                request.add_header("If-Range", self._version)
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
        size = response.headers["Content-Range" if self._at else "Content-Length"]
        size = None if size is None else size.rpartition("/")[2]
        if self._at and (response.status != 206 or (self._size or size) != size):
            response.close()
            raise NoRestError(
                "the connection broke, and the server does not give the rest of the file, or it has changed"
            )
        tag = response.headers["ETag"]
        self._version = tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]
        self._size = size
        return response

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, HTTPError):
            return error.code >= 500 or error.code in BUSY
        return self._at > 0 and not isinstance(error, NoRestError)  # one that was never there is not waited for

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
