"""Copies the pages of the documentation site: ``python -m scripts.site_pages OUT``.

Pages link to each other, to examples and to results all over the repository. The copy keeps its
structure, so that the same links hold in the repository and on the site (`make site`, mkdocs.yml).
"""

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "*.md", "LICENSE", "docs/*.md", "docs/screens/*.svg", "examples/*", "examples/*/*",
    "benchmarks/*.md", "engine/starter/CARD.md",
)  # fmt: skip


def copy_pages(out: Path) -> None:
    """Replaces the folder `out` by a copy of all pages and of what they link to."""
    shutil.rmtree(out, ignore_errors=True)
    for pattern in PAGES:
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scripts.site_pages")
    parser.add_argument("out", type=Path, help="folder, which is replaced")
    copy_pages(parser.parse_args().out)
