"""A dictd database of three entries -> labelled records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from falcon_dist.contract import UserError
from falcon_dist.foldoc import entries, write_records

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
TEXTS = {
    "00-database-info": "About this.\n",
    "ada": "Ada\n\n   <language> A {Pascal}-descended language,\n   designed for the {DoD}.\n\n   (1995-01-19)\n",
    "adb": "ADB\n\n   1. <hardware, product> {Apple Desktop Bus}, for keyboards.\n",
    "aka": "aka\n\n   <jargon> Also known as, in mail and news.\n",
}


def in_digits(number: int) -> str:
    found = ""
    while True:
        found = DIGITS[number % 64] + found
        number //= 64
        if not number:
            return found


def database() -> tuple[str, bytes]:
    index, text = "", b""
    for head, body in TEXTS.items():
        for name in (head, head.upper()):  # two headwords of one entry
            index += f"{name}\t{in_digits(len(text))}\t{in_digits(len(body.encode()))}\n"
        text += body.encode()
    return index, text


def test_tags_leave_the_definition_and_become_labels() -> None:
    ada, adb = entries(*database())
    assert ada == ("Ada", "language", "A Pascal-descended language, designed for the DoD.")
    assert (adb.term, adb.label) == ("ADB", "hardware")
    record = ada.record()
    assert record["completion"] == " language"
    assert record["prompt"].endswith('"Ada": A Pascal-descended language, designed for the DoD.### Assistant:')
    assert record["prompt"].count("language,") == 2  # in the list of labels, and in the definition itself


def test_package_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def fail(words, **options):
        raise subprocess.CalledProcessError(100, words, stderr="W: first\nE: Unable to locate package dict-foldoc\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match="E: Unable to locate package dict-foldoc; run apt-get update first"):
        write_records(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
