"""Colab: one address in all badges and set-up cells; the set-up cell does what it says, and nothing elsewhere."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import message_of

from kdutils.report.readme import BADGE, CELL, PLACEHOLDER, stamp, stamped_files
from kdutils.settings import ROOT

NAMES = [path.stem for path in stamped_files() if path.suffix == ".ipynb"]


def set_up_cells(root):
    notebooks = [nbformat.read(path, as_version=4) for path in stamped_files(root)[1:]]
    return [next(cell.source for cell in notebook.cells if cell.cell_type == "code") for notebook in notebooks]


def addresses(root):
    """What every badge and cell gives as (repository, ref), and the notebooks that README's badges open."""
    found = set()
    for path in stamped_files(root):
        badges = list(BADGE.finditer(path.read_text(encoding="utf-8")))
        assert [badge["notebook"] for badge in badges] == (NAMES if path.suffix == ".md" else [path.stem])
        cells = list(CELL.finditer(path.read_text(encoding="utf-8")))
        assert len(cells) == (path.suffix == ".ipynb")
        found |= {(match["repository"], match["ref"]) for match in badges + cells}
    return found


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "copy" / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path / "copy")
    return tmp_path / "copy"


def test_badges_and_cells_agree_and_stamping_changes_the_address_and_nothing_else(copy):
    assert len(set(set_up_cells(copy))) == 1
    before = {path: path.read_text(encoding="utf-8") for path in stamped_files(copy)}
    ((repository, ref),) = addresses(copy)
    assert stamp("https://github.com/an-owner/a.repo.git", "feature/x-1", copy) == stamped_files(copy)
    assert addresses(copy) == {("an-owner/a.repo", "feature/x-1")}
    assert stamp("https://github.com/an-owner/a.repo/", "feature/x-1", copy) == []
    for path in stamped_files(copy)[1:]:
        nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))
    stamp(f"https://github.com/{repository}", ref, copy)
    assert {path: path.read_text(encoding="utf-8") for path in stamped_files(copy)} == before


@pytest.mark.parametrize("address, ref", [
    ("https://gitlab.com/a/b", "main"), ("github.com/a/b", "main"), ("https://github.com/a", "main"),
    ('https://github.com/a/b"', "main"), ("https://github.com/a/b", ""), ("https://github.com/a/b", 'v1"'),
])  # fmt: skip
def test_an_address_or_a_ref_that_is_not_valid_is_refused(copy, address, ref):
    before = addresses(copy)
    message_of(stamp, address, ref, copy)
    assert addresses(copy) == before


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Runs the set-up cell as in Colab, with /content in a folder of its own and a pip that only succeeds."""
    mounted = []
    mount = lambda path: (mounted.append(path), (tmp_path / "drive" / "MyDrive").mkdir(parents=True))  # noqa: E731
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mount)))
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    monkeypatch.chdir(tmp_path)

    def run(address, ref, keep="False"):
        source = CELL.sub(rf"\g<q>{address}\g<q>, \g<q>{ref}\g<q>", set_up_cells(ROOT)[0])
        source = source.replace("/content", str(tmp_path)).replace("KEEP_ON_DRIVE = False", f"KEEP_ON_DRIVE = {keep}")
        exec(source, {})
        return mounted

    return run


@pytest.fixture
def repository(tmp_path):
    """A repository whose tag v1 is not its newest commit."""
    root = tmp_path / "origin"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(root)]
    (root / "notebooks").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for version in ("v1", "v2"):
        for name in ("requirements.txt", "notebooks/n.ipynb"):
            (root / name).write_text(version)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", version], check=True)
        subprocess.run([*git, "tag", version], check=True)
    return root


def test_elsewhere_the_set_up_cell_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    exec(set_up_cells(ROOT)[0], {})
    assert os.getcwd() == str(tmp_path) and list(tmp_path.iterdir()) == []


def test_before_it_is_stamped_the_cell_says_what_to_do(colab, tmp_path):
    with pytest.raises(SystemExit, match="^Write the repository's address into REPOSITORY above, .*$"):
        colab(PLACEHOLDER, "main")
    assert not (tmp_path / "kd").exists()


def test_in_colab_the_named_version_is_fetched_once_and_after_a_failure_again(colab, repository, tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        colab(repository, "no-such-ref")
    colab(repository, "v1")
    assert os.getcwd() == str(tmp_path / "kd" / "notebooks")
    assert (tmp_path / "kd" / "requirements.txt").read_text() == "v1"
    shutil.rmtree(repository)
    assert colab(repository, "v1") == []  # a restarted kernel runs the cell again


def test_runs_can_be_kept_on_drive(colab, repository, tmp_path):
    assert len(colab(repository, "v2", keep="True")) == 1
    (tmp_path / "kd" / "runs" / "kept").touch()
    assert (tmp_path / "drive" / "MyDrive" / "kd-runs" / "kept").exists()
