"""browser.py: a headless Chromium spoken to over pipes, as far as a test of the report needs one.

It speaks the Chrome DevTools Protocol: JSON messages that end in a zero byte.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)

# Chromium wants the pipes as its file descriptors 3 and 4. This small program puts them there and
# becomes Chromium.
BECOME = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

KEY_CODES = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}


def high_pipe() -> tuple[int, int]:
    """A pipe whose ends are above 9, so that they are not among those that BECOME overwrites."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]


class Browser:
    """One page. Use it as a context manager.

    problems: console errors, exceptions and refused loads. requests: every address the page asked
    for.
    """

    def __init__(self, profile, width: int = 1280, height: int = 900, limit: float = 60.0):
        self.limit = limit
        self.numbers = itertools.count(1)
        self.problems: list[dict] = []
        self.requests: list[str] = []
        self.events: list[str | None] = []
        self.rest = b""
        self.session = None
        self._start(profile, width, height)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def _start(self, profile, width: int, height: int) -> None:
        chromium_reads, self.out = high_pipe()
        self.into, chromium_writes = high_pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        pipes = [str(chromium_reads), str(chromium_writes)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", BECOME, *pipes, CHROMIUM, *options],
            pass_fds=(chromium_reads, chromium_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(chromium_reads)
        os.close(chromium_writes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def _message(self, deadline: float) -> dict:
        """The next message of Chromium, after noting what it says about the page."""
        while b"\0" not in self.rest:
            wait = max(0, deadline - time.monotonic())
            readable, _, _ = select.select([self.into], [], [], wait)
            if not readable:
                raise TimeoutError("chromium does not answer")
            received = os.read(self.into, 1 << 20)
            if not received:
                raise ConnectionError("chromium has ended")
            self.rest += received
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, facts: dict) -> None:
        self.events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        logged = event == "Log.entryAdded" and facts["entry"]["level"] == "error"
        printed = event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert")
        raised = event in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")
        if logged or printed or raised:
            self.problems.append(facts)

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol and wait for its result."""
        number = next(self.numbers)
        deadline = time.monotonic() + self.limit
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            written = os.write(self.out, data)
            data = data[written:]
        answer = self._message(deadline)
        while answer.get("id") != number:
            answer = self._message(deadline)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """Set the size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + self.limit
        while "Page.loadEventFired" not in self.events:
            self._message(deadline)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def centre(self, selector: str) -> list[float]:
        """Where an element's first line is in the window, in pixels, scrolled into view."""
        return self.run(
            "(() => {"
            f"  const element = document.querySelector({json.dumps(selector)});"
            "  element.scrollIntoView({block: 'center'});"
            "  const box = element.getClientRects()[0];"
            "  return [box.x + box.width / 2, box.y + box.height / 2];"
            "})()"
        )

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse onto an element's centre, as a person would, and perhaps click."""
        x, y = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            button = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type="mousePressed", **button)
            self.call("Input.dispatchMouseEvent", type="mouseReleased", **button)

    def key(self, name: str) -> None:
        """Press and release a key of KEY_CODES."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": KEY_CODES[name]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write the window, or the whole page, to a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
