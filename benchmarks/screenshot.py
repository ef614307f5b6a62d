"""README's picture of TensorBoard: trains configs/classifier.yaml, opens Custom Scalars in headless Chromium, draws it.

python benchmarks/screenshot.py [--logdir RUNS] [--out FILE]

Needs Chromium or Chrome (``apt-get install chromium``), TensorBoard and Pillow, nothing else: the browser is driven by
its DevTools protocol over two pipes.
"""

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PAGE = (1500, 1300)  # of the browser's window, in CSS pixels: three charts in a row
WIDTH = 1200  # of the picture
LEGEND = ("variance of the adaptive rate",)  # charts whose list of curves is opened
# Charts whose curves span orders of magnitude: what a person would click, the y axis' logarithm.
LOGARITHMIC = ("variance of the adaptive rate", "variance of its logarithm", "quantiles")

# TensorBoard's page is made of nested shadow trees, through which no selector sees.
FIND = """
const all = (root, found = []) => {
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) all(element.shadowRoot, found);
  }
  return found;
};
const cards = all(document).filter(e => e.localName === 'tf-custom-scalar-multi-line-chart-card');
const title = card => all(card.shadowRoot).find(e => e.localName === 'tf-card-heading')?.displayName ?? '';
const buttons = card => all(card.shadowRoot).filter(e => e.localName === 'paper-icon-button');
const press = (card, icon) => buttons(card).find(e => e.icon === icon).click();
"""
# The button that opens the list of a chart's curves is there when their points have come.
DRAWN = FIND + "cards.length >= 9 && cards.every(card => all(card.shadowRoot).some(e => e.icon === 'expand-more'))"
PRESS = "for (const card of cards) if (%s.some(start => title(card).startsWith(start))) press(card, %s);"
BOTTOM = FIND + "Math.max(...cards.map(card => card.getBoundingClientRect().bottom))"


class Browser:
    """Headless Chromium and its DevTools protocol: JSON messages, each with a zero byte behind, over two pipes.

    Args:
        program: its path.
        profile: an empty folder.
    """

    def __init__(self, program: str, profile: str) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads from descriptor 3 and writes to 4: a shell puts the pipes there.
        flags = ["--headless", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:  # in a container; Chromium's own sandbox refuses root
            flags.append("--no-sandbox")
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, program, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events in between are dropped."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                piece = os.read(self._in, 1 << 16)
                if not piece:
                    raise RuntimeError("Expected the browser to go on running but it has ended.")
                self._buffer += piece
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of the script's last expression."""
        answer = self.call("Runtime.evaluate", expression=f"{{{script}}}", returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"The page's script failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)


def wait_for(what: str, ready: Any, seconds: float = 60) -> None:
    """Ask until it is so."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"Expected {what} within {seconds:.0f} s.")
        time.sleep(0.3)


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard's address while it runs on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # From the folder beside it, so that the page shows a short name.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=logdir.resolve().parent, **quiet)
    address = f"http://localhost:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout", timeout=5) as page:
                return b"Adaptive rate" in page.read()
        except OSError:
            return False

    try:
        wait_for("TensorBoard to answer with the monitor's layout", answers)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def photograph(address: str, program: str) -> bytes:
    """The Custom Scalars page as a PNG, :data:`WIDTH` pixels wide, down to the last chart."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        try:
            width, height = PAGE
            size = {"width": width, "deviceScaleFactor": WIDTH / width, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", height=height, **size)
            browser.call("Page.navigate", url=f"{address}/#custom_scalars&_smoothingWeight=0")
            wait_for("nine charts to be drawn", lambda: browser.evaluate(DRAWN))
            for titles, icon in ((LOGARITHMIC, "line-weight"), (LEGEND, "expand-more")):
                browser.evaluate(FIND + PRESS % (json.dumps(titles), json.dumps(icon)))
            time.sleep(3)  # the axes move to their places
            bottom = int(browser.evaluate(BOTTOM)) + 12
            clip = {"x": 0, "y": 0, "width": width, "height": bottom, "scale": 1}
            return base64.b64decode(browser.call("Page.captureScreenshot", format="png", clip=clip)["data"])
        finally:
            browser.close()


def main() -> None:
    """Train unless there is a run, photograph, write with a palette (a third of the bytes)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logdir", type=Path, help="TensorBoard's folder of a run; without it one is trained (1 min)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tensorboard.png")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    options = parser.parse_args()
    if options.browser is None:
        parser.error(f"Expected one of {', '.join(BROWSERS)} to be installed, or --browser PATH.")
    with tempfile.TemporaryDirectory() as folder:
        logdir = options.logdir
        if logdir is None:
            logdir = Path(folder) / "runs"
            config = ROOT / "configs" / "classifier.yaml"
            command = [sys.executable, "-m", "lightning_rectify", "fit", "--config", str(config)]
            subprocess.run(command, cwd=folder, check=True)
        with tensorboard(logdir) as address:
            picture = photograph(address, options.browser)
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(options.out, optimize=True)
    print(f"{options.out}: {image.width} x {image.height} pixels, {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
