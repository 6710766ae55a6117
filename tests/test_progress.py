"""Progress: in a notebook a bar that leaves one line of text; in batch a plain line an epoch, one live line in a terminal."""

import ast
import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from kdutils.progress import STUDENTS, Batch
from kdutils.report import batch as pipeline
from kdutils.report.batch import NOTEBOOKS
from kdutils.results.tables import text_table
from kdutils.settings import ROOT

CELL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from kdutils.progress import TrainingProgress, progress_lines
from kdutils.training import Recipe, fit

x, labels = torch.zeros(8, 3), torch.arange(8) % 2
recipe = Recipe(epochs=3, batch_size=4, optimizer="sgd", schedule="constant", learning_rate=0.1, weight_decay=0.0)
for _ in progress_lines(range(5), "views"):
    pass
fit(
    torch.nn.Linear(3, 2), lambda index, view: x[index], labels,
    lambda logits, index, view: torch.nn.functional.cross_entropy(logits, labels[index]),
    recipe, num_views=1, seed=0, validation=(x, labels), progress=TrainingProgress("thing"),
)
print("done")
"""


class Watched(NotebookClient):
    """A front end that can be asked for input, as Jupyter's and Colab's can."""

    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        client.allow_stdin = True
        return client


@pytest.mark.parametrize("client", [Watched, NotebookClient])
def test_what_a_saved_notebook_holds(client, monkeypatch):
    monkeypatch.delenv("KDUTILS_PROGRESS", raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    client(notebook, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    text = "\n".join(o.text if o.output_type == "stream" else o.data["text/plain"] for o in outputs)
    assert not any(sign in text for sign in "\r\x1b") and "widgets" not in notebook.metadata
    lines = [line for line in text.splitlines() if line]
    assert lines.pop() == "done"
    if client is Watched:
        views, thing = lines
        assert views.startswith("views: 100%|█") and "5/5" in views
        assert thing.startswith("thing: 100%") and "3.0/3 epochs" in thing and "val " in thing
    else:
        assert [line.partition(",")[0] for line in lines] == [f"thing: epoch {n}/3" for n in (1, 2, 3)]


# A batch run in a terminal


def student(epoch, arm="scratch"):
    return f"{arm}, seed 0: epoch {epoch}/3, loss 1.000, val 50.0%, 9 s left"


@pytest.fixture
def batch(tiny):
    made = Batch([*NOTEBOOKS, "study"], tiny(seeds=[0, 1], epochs=3), width=90)
    made.begin(NOTEBOOKS[0])
    return made


def test_a_stage_is_one_live_line_and_its_last_state_stays(batch):
    texts = [
        batch.text(student(1), 0),
        batch.text(student(2), 1),
        batch.text(student(1, "kd resnet18"), 2),
        batch.end(),
    ]
    assert [text[:1] for text in texts] == ["\r", "\r", "\n", "\n"] and batch.end() == ""
    assert "".join(texts[:3]).count("\n") == 1
    assert batch.text("resnet50: features of every view: 3/180, 40 s left") == (
        "\r\x1b[K  [all: 1 min + teachers + study] resnet50: features of every view: 3/180, 40 s left"
    )
    assert batch.text("x: waiting for another process") == "\nx: waiting for another process\n"
    assert batch.text(student(3), 5).startswith("\r")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_live_lines_and_a_pipe_plain_ones(tiny, tmp_path, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("KDUTILS_PROGRESS", "")
    live = pipeline._live_batch(tiny())
    assert (live is not None) == is_terminal and (live is None or live.width == 70)
    with pipeline._progress_log(tmp_path / "progress.log", live):
        with open(os.environ["KDUTILS_PROGRESS"], "a") as log:  # as the kernel of a notebook does
            log.write(f"{student(1)}\n{student(2)}\n")
    plain = f"  {student(1)}\n  {student(2)}\n"
    clear = "\r\x1b[K"
    assert capsys.readouterr().out == (f"{clear}  {student(1)}{clear}  {student(2)}\n" if is_terminal else plain)


def test_the_closing_table_adds_up_the_seeds_of_a_stage(tmp_path):
    (tmp_path / "timings.csv").write_text(
        'stage,seconds\nresnet18: features of every view,61\n"student, scratch, seed 0",50\n"student, scratch, seed 1",75.5\n'
    )
    table = pipeline.times_table(tmp_path)
    assert table.values.tolist() == [
        ["resnet18: features of every view", 1, "1:01 min"],
        ["student, scratch", 2, "2:05 min"],
        ["sum", 3, "3:06 min"],
    ]
    assert text_table(table).splitlines() == [
        "Stage                             Times      Took",
        "resnet18: features of every view      1  1:01 min",
        "student, scratch                      2  2:05 min",
        "sum                                   3  3:06 min",
    ]


def test_no_line_is_wider_than_the_terminal(tiny):
    batch = Batch(NOTEBOOKS, tiny(), width=40)
    assert batch.text(student(1)) == "\r\x1b[K" + f"  {student(1)}"[:39]


def test_the_time_left_counts_the_students_that_the_notebooks_to_come_may_train(batch):
    assert batch.text(student(1), 0) == f"\r\x1b[K  {student(1)}"
    # 3 epochs of 2 seeds of 6 arms, less the 2 seen, at a minute each
    assert batch.text(student(2), 60) == f"\r\x1b[K  {student(2)}"  # too wide for more
    batch.width = 200
    assert batch.left() == "[all: 34 min + teachers + study] "
    assert batch.text("scratch, seed 1: epoch 3/3, loss 1.000, val 50.0%, 0 s left", 200).startswith(
        "\r\x1b[K  [all: 31 min + teachers + study] scratch"  # it was cut after two epochs, which are not due
    )
    batch.text("scratch, seed 1: epoch 2/3, step 5 of 9, 7 s left", 70)
    batch.text("resnet18, last_block, seed 0: epoch 1/3, loss 1.000, val 50.0%, 9 s left", 80)
    assert batch.left() == "[all: 31 min + teachers + study] "
    batch.begin(NOTEBOOKS[2])  # what was trained before took nothing
    assert batch.left() == "[all: 30 min + study] "
    batch.begin("study")
    assert batch.left() == ""


def test_trainings_side_by_side_share_a_line_and_the_time(batch):
    batch.width = 200

    def line(seed, epoch):
        return f"scratch, seed {seed}: epoch {epoch}/3, loss 1.000, val 50.0%, 9 s left"

    for now, (seed, epoch) in enumerate([(0, 1), (1, 1), (0, 2), (1, 2)]):
        assert batch.text(line(seed, epoch), 60.0 * now).startswith("\r\x1b[K")
    assert batch.seconds == [60, 60]  # each took two minutes, for two
    assert batch.left() == "[all: 32 min + teachers + study] "
    assert batch.text("kd resnet50, seed 0: epoch 1/3, loss 1.000, val 50.0%, 9 s left", 300).startswith("\n")


def test_the_unlabelled_images_of_the_notebooks_to_come_count(tiny):
    made = Batch(NOTEBOOKS, tiny(seeds=[0, 1], epochs=3, unlabelled_epochs=10, unlabelled_size=20), width=200)
    made.text(student(1), 0)
    made.text(student(2), 60)
    assert (
        made.left() == "[all: 114 min + teachers] "
    )  # 2 seeds of 6 methods in 3 epochs and of 4 in 10, less the 2 seen


def test_the_methods_that_notebooks_train_are_counted_right():
    """Those of `train_students` in each, less those that an earlier one has."""
    seen = set()
    for name in NOTEBOOKS:
        cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))]
        methods = {
            node.targets[0].id: node.value
            for node in nodes
            if isinstance(node, ast.Assign) and getattr(getattr(node.value, "func", None), "id", "") == "Method"
        }
        calls = [
            node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "train_students"
        ]
        given = [
            (methods.get(getattr(call.args[0], "id", ""), call.args[0]), ast.unparse(call.args[2])) for call in calls
        ]
        trained = {(method.args[0].value, teachers_of(method), settings) for method, settings in given}
        new = [settings for *_, settings in trained - seen]
        usual = new.count("settings")
        assert (usual, len(new) - usual) == STUDENTS[name], name
        seen |= trained


def teachers_of(method):
    return "".join(ast.unparse(keyword.value) for keyword in method.keywords if keyword.arg == "teachers")
