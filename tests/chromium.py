"""A headless Chromium for tests, driven over its own debugging protocol: no driver package is needed."""
import base64
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zerolab.scene.paths import root
from zerolab.view.gl import find_opengl

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
         "--enable-unsafe-swiftshader", "--remote-debugging-port=0", "--remote-allow-origins=*"]


# Where ZEROLAB_REQUIRE_BROWSER=1 says that nothing may be missing, no test is skipped: one that misses something fails.
REQUIRED = os.environ.get("ZEROLAB_REQUIRE_BROWSER", "") not in ("", "0")
NO_CHROMIUM, NO_OPENGL = "no chromium here: apt-get install chromium", "no OpenGL here: apt-get install libosmesa6"
chromium = pytest.mark.skipif(not (BINARY or REQUIRED), reason=NO_CHROMIUM)       # marks of tests
opengl = pytest.mark.skipif(not (find_opengl() or REQUIRED), reason=NO_OPENGL)


def missing(what):
    "Skip the test that needs `what`, or fail it."
    if REQUIRED: pytest.fail(f"ZEROLAB_REQUIRE_BROWSER is set, and there is {what}", pytrace=False)
    pytest.skip(what)


def need_chromium():
    "For a fixture that drives a browser."
    if not BINARY: missing(NO_CHROMIUM)


def need_opengl():
    "For a fixture that lets VTK draw."
    if not find_opengl(): missing(NO_OPENGL)


class Browser:
    """One page. `requests` collects every address that it asked for, `messages` what it logged."""

    def __init__(self):
        import websocket
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen([BINARY, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.numbers, self.requests, self.messages = itertools.count(1), [], []
        port = self._port()
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        self.socket = websocket.create_connection(next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"], timeout=60)
        for domain in ("Page", "Network", "Runtime", "Log"): self.call(f"{domain}.enable")

    def _port(self):
        file = Path(self.profile.name) / "DevToolsActivePort"
        for _ in range(300):
            if file.exists() and file.read_text().strip(): return file.read_text().splitlines()[0]
            time.sleep(0.1)
        raise TimeoutError("chromium did not start")

    def call(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                if "error" in answer: raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            event, details = answer.get("method"), answer.get("params", {})
            if event == "Network.requestWillBeSent": self.requests.append(details["request"]["url"])
            if event == "Network.webSocketCreated": self.requests.append(details["url"])
            if event == "Log.entryAdded" and "GPU stall" not in details["entry"]["text"]: self.messages.append(details["entry"]["text"])
            if event == "Runtime.exceptionThrown": self.messages.append(str(details["exceptionDetails"]))
            if event == "Runtime.consoleAPICalled": self.messages.append(str([part.get("value") for part in details["args"]]))

    def open(self, path, width=1280, height=900, dark=False):
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState == 'complete'")
        return self

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result: raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline: raise TimeoutError(f"{expression}: {self.messages[-3:]}")
            time.sleep(0.05)

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, **more)

    def drag(self, start, end, steps=4):
        self.mouse("mousePressed", *start, clickCount=1)
        for i in range(1, steps + 1): self.mouse("mouseMoved", *(a + (b - a) * i / steps for a, b in zip(start, end)))
        self.mouse("mouseReleased", *end, clickCount=1)

    def key(self, key, code=0):
        "Press and release a key; letters need no code."
        text = dict(text=key) if len(key) == 1 else {}
        number = code or (ord(key.upper()) if len(key) == 1 else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=number, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=number)

    def box(self, element):
        "Where an element (a JavaScript expression) is: x, y, width, height."
        return self.evaluate(f"(box => [box.x, box.y, box.width, box.height])(({element}).getBoundingClientRect())")

    def picture(self, element):
        "What an element looks like: float [H,W,3]."
        x, y, width, height = self.box(element)
        clip = dict(x=x, y=y, width=width, height=height, scale=1)
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB")).astype(float)

    def screenshot(self, path=None, full=False):
        """PNG bytes of the window, or of the whole page."""
        clip = {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}, "captureBeyondViewport": True}
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        if path: Path(path).write_bytes(png)
        return png

    def outside(self, *allowed):
        """What it asked of anything but this machine's files and addresses that begin with one of `allowed`."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", "about:", *allowed))]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()


@contextmanager
def jupyterlab(folder, work, **environment):
    "A JupyterLab of its own on the folder `work`, with all its settings below `folder`; gives its address."
    folder = Path(folder)
    quiet = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(fetchNews="false", checkForUpdates=False)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={work}", f"--LabApp.user_settings_dir={folder / 'settings'}",
               f"--LabApp.workspaces_dir={folder / 'workspaces'}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    paths = os.pathsep.join([str(root()), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **folders, "PYTHONPATH": paths, **environment}, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try: urllib.request.urlopen(f"{address}/api/status").read()
            except OSError: time.sleep(.1)
            else: break
        yield address
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
