"""The repository's address, as the Colab badges and set-up cells of the notebooks and README's badges give it."""

import re
from pathlib import Path

from kdutils.runs import write_text
from kdutils.settings import ROOT, UserError

PLACEHOLDER = "https://github.com/OWNER/REPO"
WHERE, WHICH = r"(?P<repository>[\w.-]+/[\w.-]+)", r"(?P<ref>[\w./-]+?)"
BADGE = re.compile(
    rf"(?<=https://colab\.research\.google\.com/github/){WHERE}/blob/{WHICH}(?=/notebooks/(?P<notebook>\w+)\.ipynb)"
)
# in a notebook's file the quotes are escaped
CELL = re.compile(rf'(?<=REPOSITORY, REF = )(?P<q>\\?")https://github\.com/{WHERE}(?P=q), (?P=q){WHICH}(?P=q)')


def stamped_files(root: Path = ROOT) -> list[Path]:
    """The files that hold the address."""
    return [root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))]


def stamp(address: str, ref: str, root: Path = ROOT) -> list[Path]:
    """Write a GitHub repository's address and a ref (a tag, branch or commit) into badges and set-up cells.

    Returns the files that changed. Raises `UserError` for what is no such address or ref.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not found:
        raise UserError(f"stamp: {address!r} is no address of a repository; it must look like {PLACEHOLDER}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", ref):
        raise UserError(f"--ref: {ref!r} will not do; it must be a tag, a branch or a commit, such as v1.0")
    changed = []
    for path in stamped_files(root):
        text = path.read_text(encoding="utf-8")
        new = BADGE.sub(f"{found[1]}/blob/{ref}", text)
        new = CELL.sub(rf"\g<q>https://github.com/{found[1]}\g<q>, \g<q>{ref}\g<q>", new)
        if new != text:
            write_text(path, new)
            changed.append(path)
    return changed
