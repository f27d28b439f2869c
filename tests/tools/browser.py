"""A headless chromium spoken to over pipes (Chrome DevTools Protocol): what a test of the report needs, and no more."""

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

CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell"),
        ),
    ),
    None,
)


class Browser:
    """One page. `problems` collects console errors, exceptions, refused loads; `requests` every address the page asked for."""

    def __init__(self, profile, width: int = 1280, height: int = 900, limit: float = 60.0):
        to_chromium, from_chromium = os.pipe(), os.pipe()
        here, there = (
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe]
            for pipe in (to_chromium, from_chromium)
        )
        for end in (*to_chromium, *from_chromium):
            os.close(end)
        self.limit, self.numbers, self.problems, self.requests, self.rest, self.events = (
            limit,
            itertools.count(1),
            [],
            [],
            b"",
            [],
        )
        # chromium wants them as its fds 3 and 4
        become = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                become,
                str(here[0]),
                str(there[1]),
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            pass_fds=(here[0], there[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0]), os.close(there[1])
        self.out, self.into, self.session = here[1], there[0], None
        target = next(
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.into)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("chromium does not answer")
            if not (got := os.read(self.into, 1 << 20)):
                raise ConnectionError("chromium has ended")
            self.rest += got
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        name, facts = message.get("method"), message.get("params", {})
        self.events.append(name)
        if (
            name == "Runtime.exceptionThrown"
            or name == "Runtime.consoleAPICalled"
            and facts["type"] in ("error", "assert")
        ):
            self.problems.append(facts)
        if name == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.problems.append(facts["entry"])
        if name == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        if name == "Page.javascriptDialogOpening":
            self.problems.append(facts)
        return message

    def call(self, method: str, **parameters) -> dict:
        number, deadline = next(self.numbers), time.monotonic() + self.limit
        message = {"id": number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while (answer := self._message(deadline)).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path) -> None:
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
        """Where an element's first line stands in the window, in pixels, scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse onto an element's centre, as a person would, and perhaps click."""
        x, y = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
                )

    def key(self, name: str) -> None:
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=codes[name],
            )

    def screenshot(self, path, whole: bool = False) -> None:
        path.write_bytes(
            base64.b64decode(
                self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
            )
        )
