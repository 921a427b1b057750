"""A real browser without a window, for tests of pages."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--window-size=500,3000"),
)


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Start the browser with its profile in `folder`, or skip the test if there is none."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [browser, *SWITCHES, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def assert_shown(page: Path, folder: Path, *arguments: str) -> None:
    """The page shows something, and the browser has nothing to complain about."""
    screenshot = folder / "page.png"
    seen = browse(folder, *arguments, f"--screenshot={screenshot}", page.as_uri())
    assert "CONSOLE" not in seen.stderr, seen.stderr
    with Image.open(screenshot) as image:
        assert np.asarray(image.convert("L")).std() > 10


def answer(html: str, script: str, folder: Path, *arguments: str) -> list:
    """Return the list of lists that a script leaves, as JSON, in the place of the page `html`."""
    probe = folder / "probe.html"
    probe.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom = browse(folder, *arguments, "--dump-dom", probe.as_uri()).stdout
    return json.loads(re.search(r"\[\[.*\]\]", dom).group())


def assert_pictures_fit(page: Path, folder: Path, count: int) -> None:
    """All pictures are there and wide enough to be read, and the page does not scroll sideways."""
    # The page itself allows no script, so a copy without that rule measures its pictures.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    script = """addEventListener("load", () => { document.documentElement.innerHTML =
        JSON.stringify([...document.images].map(i => [i.naturalWidth, i.clientWidth])
        .concat([[document.documentElement.scrollWidth, innerWidth]])); });"""
    *widths, (page_width, window_width) = answer(html, script, folder)
    assert len(widths) == count
    assert all(natural > 0 and shown > 100 for natural, shown in widths)
    assert page_width <= window_width, "the page scrolls sideways"
