"""Progress in a notebook: a bar that leaves one line of text; in batch one plain line an epoch."""

import nbformat
import pytest
from nbclient import NotebookClient

from kdutils.settings import ROOT

CELL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from kdutils.training import Recipe, fit, progress_lines

x, labels = torch.zeros(8, 3), torch.arange(8) % 2
recipe = Recipe(epochs=3, batch_size=4, optimizer="sgd", schedule="constant", learning_rate=0.1, weight_decay=0.0)
for _ in progress_lines(range(5), "views"):
    pass
fit(
    torch.nn.Linear(3, 2), lambda index, view: x[index], labels,
    lambda logits, index, view: torch.nn.functional.cross_entropy(logits, labels[index]),
    recipe, num_views=1, seed=0, validation=(x, labels), name="thing",
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
