"""Check links and commands: `python docs/check_pages.py`, after the site was built.

Pages of the site: each link, picture and anchor. Markdown files of the repository: each relative path, and in
their shell blocks each verb and option of `brainflow`, by what its `--help` says (`docs/commands.md`).
Addresses on the web are checked where there is one: `python -m sphinx -b linkcheck docs docs/_build/links`.
"""

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_build" / "html"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag leads to and what it is called."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@cache
def page(path: Path) -> _Page:
    """Return the links and anchors of an HTML file."""
    return _Page(path.read_text(encoding="utf-8"))


def broken_in_site() -> list[str]:
    """Return what leads nowhere in the pages of the site."""
    found = []
    for path in sorted(SITE.rglob("*.html")):
        for link in sorted(page(path).links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{path.relative_to(SITE)}: {link}: no such file")
            elif target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors:
                found.append(f"{path.relative_to(SITE)}: {link}: no such anchor")
    return found


def markdown() -> dict[str, str]:
    """Return the Markdown files of the repository and their text."""
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in files.stdout.split()}


def broken_in_repository() -> list[str]:
    """Return relative paths in Markdown files, outside code, that do not exist."""
    found = []
    for name, whole in markdown().items():
        text = re.sub(r"```.*?```|`[^`]*`", "", whole, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            parts = urlsplit(link)
            if not parts.scheme and parts.path and not (ROOT / name).parent.joinpath(parts.path).exists():
                found.append(f"{name}: {link}: no such file")
    return found


def wrong_commands() -> list[str]:
    """Return the verbs and options in shell blocks that the command line does not have."""
    parts = re.split(r"^## (\S+)$", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), flags=re.M)
    help_of = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = []
    for name, whole in markdown().items():
        blocks = re.findall(r"```(?:bash|\{code-cell\} ipython3\n%%bash[^\n]*)\n(.*?)```", whole, re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            own = re.sub(r"brainmarks\.\S+ brainflow", "", line)  # there it is the name of a model
            for verb, rest in re.findall(
                r"(?:^|\s)brainflow (?![-.])(\S+)([^|#;&]*)", own.partition(" # ")[0]
            ):
                options = re.findall(r"(?<!\S)(--[a-z][a-z.-]*)", rest)
                if verb not in help_of:
                    found.append(f"{name}: brainflow {verb}: no such verb")
                elif wrong := [o for o in options if not re.search(rf"{o}(?![a-z.-])", help_of[verb])]:
                    found.append(f"{name}: brainflow {verb} {' '.join(wrong)}: no such option")
    return found


if __name__ == "__main__":
    pages = len(list(SITE.rglob("*.html")))
    if not pages:
        sys.exit(f"{SITE}: no page; build the site first: python -m sphinx docs docs/_build/html")
    broken = broken_in_site() + broken_in_repository() + wrong_commands()
    print("\n".join([*broken, f"{pages} pages, {len(broken)} faults"]))
    sys.exit(bool(broken))
