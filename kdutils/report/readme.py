"""README.md: the results' tables and pictures; the repository's address, which the notebooks have too."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from kdutils.cache import write_atomically, write_text
from kdutils.results.tables import as_text
from kdutils.settings import ROOT, UserError, shown_path


def markdown_table(frame: pd.DataFrame) -> str:
    """The frame as a table in GitHub's Markdown."""
    texts = as_text(frame)
    rows = [list(texts.columns), ["---"] * texts.shape[1], *texts.values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def update_readme(path: Path, tables: Mapping[str, pd.DataFrame], notes: str = "") -> None:
    """Put the tables, and `notes` under them, between `<!-- results:begin -->` and `<!-- results:end -->`.

    Tables are given by title; one with a title is folded under it. Raises `UserError` where a mark is missing.
    """
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"README: {shown_path(path)} needs one line {begin} and, after it, one line {end}")
    folded = "<details><summary>{}</summary>\n\n{}\n\n</details>"
    shown = {title: markdown_table(frame) for title, frame in tables.items()}
    parts = [folded.format(title, table) if title else table for title, table in shown.items()]
    body = "\n\n".join(filter(None, [*parts, notes.strip()]))
    write_text(path, f"{text[: text.index(begin)]}{begin}\n{body}\n{text[text.index(end) :]}")


def update_pictures(readme: Path, notebooks: Sequence[Path]) -> None:
    """Renew each `docs/pictures/<name>.png` that the README shows from the figure `<name>` of an executed notebook."""
    import nbformat

    shown = set(re.findall(r"docs/pictures/([a-z0-9-]+)\.png", readme.read_text(encoding="utf-8")))
    for path in notebooks:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", ()):
                name = output.get("metadata", {}).get("kdutils", {}).get("name")
                if name in shown and "image/png" in output.data:
                    picture = base64.b64decode(output.data["image/png"])
                    target = readme.parent / "docs" / "pictures" / f"{name}.png"
                    write_atomically(target, partial(Path.write_bytes, data=picture))


PLACEHOLDER = "https://github.com/OWNER/REPO"
WHERE, WHICH = r"(?P<repository>[\w.-]+/[\w.-]+)", r"(?P<ref>[\w./-]+?)"
BADGE = re.compile(
    rf"(?<=https://colab\.research\.google\.com/github/){WHERE}/blob/{WHICH}"
    r"(?=/notebooks/(?:beyond/)?(?P<notebook>\w+)\.ipynb)"
)
# in a notebook's file the quotes are escaped
CELL = re.compile(rf'(?<=REPOSITORY, REF = )(?P<q>\\?")https://github\.com/{WHERE}(?P=q), (?P=q){WHICH}(?P=q)')


def stamped_files(root: Path = ROOT) -> list[Path]:
    """The files that hold the address."""
    folder = root / "notebooks"
    return [root / "README.md", *sorted(folder.glob("*.ipynb")), *sorted(folder.glob("beyond/*.ipynb"))]


def stamp(address: str, ref: str, root: Path = ROOT) -> list[Path]:
    """Write a GitHub repository's address and a ref (a tag, branch or commit) into badges and set-up cells.

    Returns the files that changed. Raises `UserError` for an address or a ref that is not valid.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not found:
        raise UserError(f"stamp: {address!r} is not the address of a repository; it looks like {PLACEHOLDER}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", ref):
        raise UserError(f"--ref: {ref!r} is not valid; use a tag, a branch or a commit, such as v1.0")
    changed = []
    for path in stamped_files(root):
        text = path.read_text(encoding="utf-8")
        new = BADGE.sub(f"{found[1]}/blob/{ref}", text)
        new = CELL.sub(rf"\g<q>https://github.com/{found[1]}\g<q>, \g<q>{ref}\g<q>", new)
        if new != text:
            write_text(path, new)
            changed.append(path)
    return changed
