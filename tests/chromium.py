"""A headless Chromium by the DevTools protocol over a pipe: no network, no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 10  # seconds for an answer
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *(
        "--mute-audio",
        "--autoplay-policy=no-user-gesture-required",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ),
)


class Page:
    """The one page of a browser."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._count = write, read, b"", 0
        self._session: str | None = None
        self._loaded: set[str] = set()
        self.messages: list[dict[str, Any]] = []  # of the log: what the page's policy refuses
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.call("Log.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        self._until = time.monotonic() + PATIENCE
        while (answer := self._next()).get("id") != self._count:
            self._keep(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = max(0.0, self._until - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            assert ready, f"the browser has not answered for {PATIENCE} s"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _keep(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            self.messages.append(params["entry"])
        elif method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])

    def open(self, file: Path, fragment: str = "") -> None:
        """Open a file, and wait until it is loaded."""
        for url in ("about:blank", file.resolve().as_uri() + fragment):
            self.messages.clear()
            self._loaded.clear()
            loader = self.call("Page.navigate", url=url)["loaderId"]
            while loader not in self._loaded:
                self._keep(self._next())

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or what its promise is kept with."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def show(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Have a window of a width, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page, or of what the window shows."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(taken["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser whose profile is in a folder."""
    ours, theirs = os.pipe(), os.pipe()  # what we write, and what they do
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]
    os.close(ours[0])
    os.close(theirs[1])
    command = [str(PROGRAM), *OPTIONS, f"--user-data-dir={folder}"]
    start = (  # it is to have the ends as its descriptors 3 and 4
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-ISc", start, *map(str, ends), *command],
        pass_fds=ends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for end in ends:
        os.close(end)
    try:
        page = Page(ours[1], theirs[0])
        yield page
        page.call("Browser.close")
        process.wait(10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours[1])
        os.close(theirs[0])
