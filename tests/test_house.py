"""The house: every module imports only from those above it, and the lab is built on the core, never the reverse."""

import ast
import json

import pytest

from kdutils.settings import ROOT

ORDER = """
settings compat progress cache
data.shapes data.views data.images
weights models losses parallel training teachers students
results.metrics results.record results.tables results.sweeps results.figures
report.show report.latex report.claims report.readme report.batch
lab.tutorial lab.predict lab.export lab.sweeps lab.study lab.performance lab.bench
__main__
""".split()
PACKAGE = ROOT / "kdutils"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


def imported(source):
    """The modules of the package that a source imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kdutils":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("kdutils.")}
    names = {name.removeprefix("kdutils.") for name in found}
    return {module for module in ORDER for name in names if name == module or name.startswith(f"{module}.")}


def test_the_order_names_every_module():
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(ORDER) == sorted(".".join(path.parts) for path in files)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module):
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    below = imported(source) - {*ORDER[: ORDER.index(module)]}
    assert not below, f"{module} imports {', '.join(sorted(below))}, which stand below it"


def test_packages_import_nothing_when_they_are_opened():
    for path in PACKAGE.rglob("__init__.py"):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        assert not any(
            isinstance(node, (ast.Import, ast.ImportFrom)) and "kdutils" in ast.unparse(node) for node in top
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_four_notebooks_need_nothing_of_the_lab(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(module.startswith("lab.") for source in sources for module in imported(source))
