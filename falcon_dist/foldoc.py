"""The Free On-line Dictionary of Computing as a task with labels: which category does a term belong to?

From the Debian package dict-foldoc (GFDL 1.1 or later, editor Denis Howe, www.foldoc.org), which is fetched and
unpacked without being installed; nothing of its text is in this project. Each entry's own category tag is taken
out of the definition and asked back.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from falcon_dist.contract import UserError

PACKAGE: Final = "dict-foldoc"
LABELS: Final = ("language", "networking", "hardware", "mathematics", "company", "database", "storage", "graphics")
"""Eight of the 112 tags, chosen before any training: single words that begin with different tokens."""
_SHOWN: Final = 160
"""Characters of a definition that are shown."""
_TAGGED: Final = re.compile(r"^(?:[A-Za-z0-9./ -]{1,20}\s+)?<([a-z ,]+)>\s+(.*)$", re.DOTALL)
_DIGITS: Final = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class Entry(NamedTuple):
    """A term of the dictionary with one of LABELS."""

    term: str
    label: str
    definition: str

    def record(self) -> dict[str, str]:
        """As a prompt/completion record; "term" is the key of the split."""
        shown = " ".join(self.definition.split())[:_SHOWN]
        question = f'Which one of these does the term belong to: {", ".join(LABELS)}? "{self.term}": {shown}'
        prompt = f"### Human: {question}### Assistant:"
        return {"term": self.term, "label": self.label, "prompt": prompt, "completion": f" {self.label}"}


def write_records(out: Path) -> None:
    """Fetches the package and writes one record for each labelled entry as JSONL.

    Raises:
        UserError: the package cannot be fetched or unpacked on this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = _fetch(Path(folder))
        index = (place / "foldoc.index").read_text(encoding="utf-8", errors="replace")
        text = gzip.decompress((place / "foldoc.dict.dz").read_bytes())
    with out.open("w") as file:
        for found in entries(index, text):
            file.write(json.dumps(found.record(), ensure_ascii=False) + "\n")


def _fetch(folder: Path) -> Path:
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f'data.name: "debian:{PACKAGE}" needs apt-get and dpkg-deb: {error.strerror}') from error
    except subprocess.CalledProcessError as error:
        last = next(iter(reversed(error.stderr.strip().splitlines())), "no reason given")
        raise UserError(f"data.name: cannot fetch debian:{PACKAGE}: {last}; run apt-get update first") from error
    return folder / "usr" / "share" / "dictd"


def entries(index: str, text: bytes) -> Iterator[Entry]:
    """Labelled entries of a dictd database (its format: dictd(8) of the dict project).

    Args:
        index: lines of headword, offset and length, tab-separated, the numbers in base 64.
        text: the uncompressed database, UTF-8.
    """
    seen: set[tuple[int, int]] = set()
    for line in index.splitlines():
        head, offset, length = line.split("\t")[:3]
        place = (_number(offset), _number(length))
        if head.startswith(("00-database", "00database")) or place in seen:
            continue
        seen.add(place)
        found = _entry(text[place[0] : sum(place)].decode("utf-8", "replace"))
        if found is not None:
            yield found


def _entry(text: str) -> Entry | None:
    term, _, body = text.partition("\n")
    body = re.sub(r"[{}]|\(\d{4}-\d\d-\d\d\)", "", body)
    body = "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", body) if part.strip())
    tagged = _TAGGED.match(body)
    label = tagged.group(1).split(",")[0].strip() if tagged else ""
    if tagged is None or label not in LABELS or not term.strip() or len(body) < 20:
        return None
    return Entry(term=term.strip(), label=label, definition=tagged.group(2))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value
