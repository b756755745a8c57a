"""A headless Chromium for tests, driven over its own debugging protocol: no driver package is needed."""
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", "--enable-unsafe-swiftshader", "--remote-debugging-port=0", "--remote-allow-origins=*"]


class Browser:
    """One page. `requests` collects every address that it asked for, `messages` what it logged."""

    def __init__(self):
        import websocket
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen([BINARY, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.numbers, self.requests, self.messages = itertools.count(1), [], []
        port = self._port()
        import urllib.request
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

    def screenshot(self, path=None, full=False):
        """PNG bytes of the window, or of the whole page."""
        clip = {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}, "captureBeyondViewport": True}
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        if path: Path(path).write_bytes(png)
        return png

    def outside(self):
        """What it asked of anything but this machine's files."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", "about:"))]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()
