"""The example of docs/ocr.md, as its page runs it: ascent under `ocr` from empty stencils writes a word."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly
SCRIPT = Path(__file__).parents[2] / "dev/ocr/write_words.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("word", ["CAT", "42"])
def test_ascent_writes_a_word(word, tmp_path):
    pytest.importorskip("rapidocr")
    command = [sys.executable, SCRIPT, word, "--seeds", "2", "--out", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (row,) = json.loads((tmp_path / "words.json").read_text())
    assert row["recogniser"] == word and row["log_likelihood"] > -0.1
    assert row["cpu_seconds"] < 60
    assert (tmp_path / f"{word}-2.png").is_file()
