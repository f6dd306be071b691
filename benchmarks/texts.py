"""Make the two held-out texts of the quality table from Debian packages.

near.txt: the prose of the Debian Handbook (package debian-handbook), near the calibration text, which is technical
English. far.txt: the four gospels of the King James Bible (packages bible-kjv and bible-kjv-text), far from it.

    apt-get install debian-handbook bible-kjv
    python benchmarks/texts.py --out texts/
"""

from __future__ import annotations

import argparse
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

HIDDEN = {"script", "style", "head", "pre"}
BREAKING = {"p", "li", "h1", "h2", "h3", "div"}


class Prose(HTMLParser):
    """Collects visible text, one line per paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in HIDDEN
        if tag in BREAKING:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def handbook(folder: Path) -> str:
    """Return the paragraphs of more than 80 characters, pages in name order."""
    pages = []
    for page in sorted(folder.glob("*.html")):
        parser = Prose()
        parser.feed(page.read_text(encoding="utf-8"))
        lines = [re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\n")]
        pages.append("\n\n".join(line for line in lines if len(line) > 80))
    return "\n\n".join(page for page in pages if page)


def gospels() -> str:
    """Return Matthew to John, one verse a line, without references."""
    printed = subprocess.run(["bible", "-f", "Matt-John"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^\w+:\d+ ", "", printed, flags=re.MULTILINE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handbook", type=Path, default=Path("/usr/share/doc/debian-handbook/html/en-US"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "near.txt").write_text(handbook(arguments.handbook), encoding="utf-8")
    (arguments.out / "far.txt").write_text(gospels(), encoding="utf-8")
