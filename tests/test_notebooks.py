"""The four notebooks as files: one parameters cell, no outputs, no functions, no numbers typed by hand."""

import ast
import builtins
import dataclasses
import importlib
import re

import nbformat
import pytest

from kdutils.report.batch import NOTEBOOKS
from kdutils.settings import ROOT, Settings

PATHS = [path for folder in (".", "beyond") for path in sorted((ROOT / "notebooks" / folder).glob("*.ipynb"))]
SETTINGS = {field.name for field in dataclasses.fields(Settings)}
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parameters(path):
    """The parameters cell: the first code cell after the set-up for Colab."""
    return code(path)[1]


def prose(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def names_bound(tree):
    """The names that a cell leaves in the notebook's namespace."""
    inner = {id(node) for scope in ast.walk(tree)
             if isinstance(scope, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
             for generator in scope.generators for node in ast.walk(generator.target)}  # fmt: skip
    found = {node.id for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inner}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return found


def test_there_is_one_notebook_a_task_and_one_of_the_study():
    assert tuple(path.stem for path in PATHS) == (*NOTEBOOKS, "study")
    assert [name[:3] for name in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


@each
def test_valid_nbformat_4_5_for_plain_python3_with_readable_cell_ids(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) for name in ids)
    assert not any(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", name) for name in ids)


@each
def test_no_outputs_are_kept(path):
    for cell in code(path):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert set(cell.metadata) <= {"tags"}, cell.id


@each
def test_one_parameters_cell_follows_the_set_up_cell(path):
    tags = [cell.metadata.get("tags", []) for cell in code(path)]
    assert tags[:2] == [["colab"], ["parameters"]] and not any(tags[2:])
    assert parameters(path).source.startswith("# Parameters")


@each
def test_parameters_are_settings_and_leave_the_choice_to_the_profile(path):
    tree = ast.parse(parameters(path).source)
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in tree.body)
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}
    assert len(given) == len(tree.body) and set(given) <= SETTINGS
    assert given.pop("profile") == "cifar10" and set(given.values()) == {None}
    assert {"data", "data_name", "weights", "seeds", "epochs"} <= set(given)
    lines = parameters(path).source.splitlines()
    assert all("#" in line for line in lines), "every parameter has its comment"


@each
def test_the_distillation_parameters_are_in_sight_where_they_are_used(path):
    given = names_bound(ast.parse(parameters(path).source))
    for name in ("temperature", "alpha"):
        used = any(f"settings.{name}" in cell.source for cell in code(path))
        assert used == (name in given)


@each
def test_no_functions_are_defined_and_no_other_cell_assigns_a_parameter(path):
    """notebook_settings reads names from the notebook: run a second time, it would take such a name for a parameter."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    for cell in code(path):
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, kinds) for node in ast.walk(tree)), cell.id
        assert cell.id == parameters(path).id or not names_bound(tree) & SETTINGS, cell.id


@each
def test_the_settings_name_the_teachers_and_no_code_does(path):
    for cell in code(path):
        assert not re.search("resnet|efficientnet|lite[02]", cell.source, re.IGNORECASE), cell.id


@each
def test_every_import_is_used_and_names_from_kdutils_exist(path):
    trees = [ast.parse(cell.source) for cell in code(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    assert imported <= {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in imports:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kdutils"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@each
def test_every_name_is_bound_before_it_is_used(path):
    """The notebook runs top to bottom: what a cell reads, that cell or one above it made."""
    known = set(dir(builtins))
    for cell in code(path):
        tree = ast.parse(cell.source)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        stored, read_here = (
            {name.id for name in names if isinstance(name.ctx, kind)} for kind in (ast.Store, ast.Load)
        )
        assert read_here - known - stored - names_bound(tree) == set(), cell.id
        known |= names_bound(tree)


@each
def test_the_names_of_figures_and_tables_are_unique(path):
    calls = [node for cell in code(path) for node in ast.walk(ast.parse(cell.source))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("show_figure", "show_table")]  # fmt: skip
    names = [ast.unparse(call.args[1]) for call in calls]
    assert len(names) >= 3 and len(set(names)) == len(names)
    assert all(len(call.args) >= 3 for call in calls), "every one has a caption"


def test_no_two_notebooks_show_the_same_name():
    names = [re.findall(r'show_(?:figure|table)\([^"]*?"([a-z0-9-]+)"', cell.source, re.DOTALL)
             for path in PATHS for cell in code(path)]  # fmt: skip
    names = sum(names, [])
    assert len(names) > 10 and len(set(names)) == len(names)


@each
def test_no_result_is_typed_by_hand(path):
    for text in prose(path):
        assert not re.search(r"\d+(\.\d+)?\s?(%|per ?cent|points)", text), text
        # counts depend on the profile, the demo's are others
        assert not re.search(r"\b\d{1,3}(,\d{3})+\b", text), text


@each
def test_it_reads_as_a_lab_report(path):
    text = "\n".join(prose(path))
    assert text.startswith(("# Task ", "# The study: ")) and "**Question.**" in text and "## What it means" in text
    assert read(path).cells[0].cell_type == "markdown"


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem[0].isdigit()], ids=lambda path: path.stem)
def test_it_ends_with_exercises_that_name_their_cell(path):
    """Each says which cell to edit: the parameters cell, or that under a heading."""
    last = read(path).cells[-1]
    assert last.cell_type == "markdown" and last.source.startswith("## Exercises\n")
    exercises = re.findall(r"^\d\. .+?(?=^\d\. |\Z)", last.source, re.MULTILINE | re.DOTALL)
    assert 2 <= len(exercises) <= 3
    headings = re.findall(r"^## (.+)$", "\n".join(prose(path)), re.MULTILINE)
    names = {name for cell in code(path) for name in re.findall(r"\w+", cell.source)}
    for exercise in exercises:
        under = re.findall(r"the cell under \*(.+?)\*", exercise)
        assert set(under) <= set(headings)
        assert under or re.search(r"the parameters cell|the same cell", exercise)
        assert set(re.findall(r"`([a-z_]\w*)(?: = [^`]*)?`", exercise)) <= names
