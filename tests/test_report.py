"""The way from a notebook's outputs to the PDF: what is shown, what is exported, what the prose says."""

import base64
import html
import io
import re
import shutil
import subprocess

import matplotlib
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

matplotlib.use("agg")

import matplotlib.pyplot as plt

from kdutils.report import latex as report
from kdutils.report.claims import CLAIMS, CORE
from kdutils.results import figures
from kdutils.results.tables import spread
from kdutils.settings import UserError

NASTY = r"50% & $x_1$ #~^\{} <é|±>"
needs_tex = pytest.mark.skipif(
    shutil.which("latexmk") is None or shutil.which("pdftotext") is None,
    reason="latexmk or pdftotext is missing (apt: latexmk texlive-latex-extra lmodern poppler-utils)",
)


@pytest.fixture
def shown(monkeypatch):
    """What the show_* functions displayed: a list of (bundle, metadata)."""
    outputs = []
    monkeypatch.setattr(report, "display", lambda data, raw, metadata: outputs.append((data, metadata)))
    return outputs


def a_figure():
    fig, axes = plt.subplots(figsize=(3, 2))
    axes.plot([1, 2, 3])
    return fig


def a_notebook(path, outputs, cells=()):
    """An executed notebook (format 4.5) with the outputs (bundle, metadata), each in its own cell."""
    shows = [
        new_code_cell(
            f"show(50 % {i}, 'α_é')  # {{x}}",
            execution_count=i,
            outputs=[new_output("display_data", data=data, metadata=metadata)],
        )
        for i, (data, metadata) in enumerate(outputs, start=1)
    ]
    nb = new_notebook(cells=[new_markdown_cell("# A title\n\n## Part 50% of `it`"), *shows, *cells])
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.validate(nb)
    nbformat.write(nb, path)
    return path


def a_report(folder, body):
    """A folder with the preamble of the real report.tex around another body."""
    source = (report.REPORT / "report.tex").read_text(encoding="utf-8")
    preamble = source[: source.index(r"\begin{document}")]
    folder.mkdir()
    text = preamble + r"\begin{document}" + body + r"\end{document}"
    (folder / "report.tex").write_text(text, encoding="utf-8")
    shutil.copy(report.REPORT / "references.bib", folder)
    return folder


def some_results(kd=(0.70, 0.71, 0.72), scratch=(0.68, 0.69, 0.695)):
    teacher = (2, "last_layer", "resnet50", (0.8, 0.81))
    arms = [(1, "scratch", "", scratch), teacher, (3, "kd", "resnet50", kd)]
    rows = [
        (task, arm, teachers, 100, 2, seed, "test", metric, value if metric == "accuracy" else 1 - value)
        for task, arm, teachers, values in arms
        for seed, value in enumerate(values)
        for metric in ("accuracy", "nll", "ece")
    ]
    return pd.DataFrame(rows, columns="task arm teachers labels epochs seed split metric value".split())


def test_a_figure_is_one_bundle_with_its_caption_and_is_closed(shown):
    fig = a_figure()
    report.show_figure(fig, "curves", NASTY, note="Generated data.")
    assert not plt.fignum_exists(fig.number)
    [(data, metadata)] = shown
    caption = f"{NASTY} Generated data."
    assert metadata == {"kdutils": {"kind": "figure", "name": "curves", "caption": caption}}
    assert set(data) == {"image/png", "application/pdf", "text/plain"}
    report.show_figure(a_figure(), "curves", NASTY)
    assert shown[1][0]["application/pdf"] == data["application/pdf"]


def bands(png):
    """How many bands of rows with something in them a picture has, white rows between them."""
    inked = (plt.imread(io.BytesIO(png))[..., :3] < 0.9).any(axis=(1, 2))
    return int(inked[0]) + int((inked[1:] & ~inked[:-1]).sum())


@pytest.mark.parametrize("arms", [1, 3])
@pytest.mark.parametrize("sticks_out", [False, True])
def test_a_figures_caption_is_under_all_else_that_it_shows(shown, arms, sticks_out):
    history = {"train_loss": [2, 1], "val_loss": [2, 1], "train_accuracy": [0, 1], "val_accuracy": [0, 1]}
    fig = figures.learning_curves({f"from ResNet-{arm}": [history] for arm in range(arms)})
    plain = io.BytesIO()
    fig.savefig(plain, format="png", dpi=110)
    if sticks_out:
        fig.text(0, -0.1, "label")
    report.show_figure(fig, "curves", "gist")
    with_caption = base64.b64decode(shown[0][0]["image/png"])
    assert bands(with_caption) == bands(plain.getvalue()) + sticks_out + 1


def test_a_table_is_html_and_booktabs_with_numbers_to_the_right(shown):
    row = {"Class_": "cat & dog", "n": 9000, "Accuracy": "68.60 ± 0.21", "NLL": None}
    frame = pd.DataFrame([row])
    report.show_table(frame, "scores", NASTY)
    [(data, metadata)] = shown
    assert metadata["kdutils"]["kind"] == "table"
    assert r"\begin{tabular}{lrrr}" in data["text/latex"] and r"\toprule" in data["text/latex"]
    assert r"cat \& dog & 9,000 & 68.60~±~0.21 & –" in data["text/latex"]
    page = data["text/html"]
    assert page.index(html.escape(NASTY)) < page.index("<table")
    assert "<td style='text-align:left'>cat &amp; dog</td><td style='text-align:right'>9,000</td>" in page
    assert "<th style='text-align:left'>Class_</th><th style='text-align:right'>n</th>" in page


def test_the_numbers_of_a_column_stand_on_their_decimal_points(shown):
    frame = pd.DataFrame({"Value": ["1.020 ± 0.007", "79.49 ± 10.45", "70.1", "–"], "Seeds": ["5", "10", "3", "1"],
                          "Difference": ["–", "+1.33 [+0.86, +1.80]", "−0.42 [−1.23, +0.39]", "+0.90 (one seed)"]})  # fmt: skip
    report.show_table(frame, "scores", "caption")
    text = shown[0][0]["text/latex"]
    assert r"\begin{tabular}{rrr}" in text
    assert r"1.020~±~\phantom{0}0.007 & 5 &" in text
    assert r"79.49\phantom{0}~±~10.45\phantom{7} & 10 &" in text
    assert r"70.1\phantom{20}\phantom{~±~10.007} & 3 &" in text
    assert r"–\phantom{.020}\phantom{~±~10.007} & 1 & +0.90 (one seed) \\" in text


@pytest.mark.parametrize("name", ["", "Curves", "a b", "a_b", "a/b", None])
def test_a_name_of_other_characters_is_an_error(name, shown):
    with pytest.raises(UserError, match="a-z, 0-9 and -"):
        report.show_table(pd.DataFrame({"a": [1]}), name, "caption")
    assert shown == []


def test_a_name_used_twice_is_an_error_that_names_both_places(tmp_path, shown):
    report.show_figure(a_figure(), "curves", "caption")
    one, two = (a_notebook(tmp_path / name, shown) for name in ("01_one.ipynb", "02_two.ipynb"))
    with pytest.raises(UserError, match="'curves' is used in 01_one.ipynb, cell 2 and in 02_two.ipynb"):
        report.export_notebooks([one, two], tmp_path / "generated")
    assert not (tmp_path / "generated").exists()


@pytest.mark.parametrize("cell, message", [
    (new_code_cell("later()"), "cell 2 has not been run"),
    (new_code_cell("1 / 0", execution_count=1, outputs=[
        new_output("error", ename="ZeroDivisionError", evalue="by 0", traceback=[])]), "DivisionError: by"),
])  # fmt: skip
def test_a_notebook_that_did_not_finish_is_an_error(tmp_path, cell, message):
    with pytest.raises(UserError, match=message):
        report.export_notebooks([a_notebook(tmp_path / "a.ipynb", [], [cell])], tmp_path / "generated")


def test_an_export_removes_what_an_earlier_one_left_but_not_the_macros(tmp_path, shown):
    out = tmp_path / "generated"
    report.write_macros({"a": "b"}, out)
    for name in ("old", "new"):
        report.show_figure(a_figure(), name, "caption")
        report.export_notebooks([a_notebook(tmp_path / f"{name}.ipynb", shown[-1:])], out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"macros.tex", "notebooks.tex", "new.tex", "new-code.tex", "figures/new.pdf"}


@needs_tex
@pytest.mark.filterwarnings("ignore:Glyph")
def test_captions_cells_values_and_code_are_typeset_as_they_are(tmp_path, shown):
    report.show_figure(a_figure(), "curves", NASTY + " αβ ≤ 猫")
    report.show_table(pd.DataFrame({NASTY: [NASTY], "n": [1.5]}), "scores", NASTY)
    out = tmp_path / "generated"
    report.export_notebooks([a_notebook(tmp_path / "01_nasty_name.ipynb", shown)], out)
    report.write_macros({"some/key_1": '68.60 ± 0.21 −1.00 --seeds "q"', "command": "run -p seeds '[0]'"}, out)
    body = r"\putfloat{curves}\putfloat{scores} \val{some/key_1} \val{command} \tab{scores} \foreachnotebook{-code}"
    folder = a_report(tmp_path / "report", body)
    report.build_pdf(folder, out, tmp_path / "a.pdf")
    report.build_pdf(folder, out, tmp_path / "b.pdf")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    text = subprocess.check_output(["pdftotext", "-layout", tmp_path / "a.pdf", "-"], encoding="utf-8")
    assert f"Figure 1: {NASTY} αβ ≤ [U+732B]" in text and f"Table 1: {NASTY}" in text
    assert "68.60 ± 0.21 −1.00 --seeds" in text and '"q"' in text
    assert "-p seeds '[0]'" in text  # a shell can read it
    assert "A title (01_nasty_name)" in text and "Part 50% of it" in text
    assert "show(50 % 1, " in text and "{x}" in text
    assert text.count(NASTY) == 4


@needs_tex
@pytest.mark.parametrize("body, message", [
    (r"\val{kd/none/mean}", "no value is named 'kd/none/mean'"),
    (r"\putfloat{no-such}", "no figure or table is named 'no-such'"),
    (r"See \fig{elsewhere}.", "undefined references: fig:elsewhere"),
    (r"See \citet{nobody2000}. \bibliographystyle{plainnat}\bibliography{references}", "nobody2000"),
])  # fmt: skip
def test_what_is_undefined_fails_the_build_and_is_named(tmp_path, body, message):
    out = tmp_path / "generated"
    report.export_notebooks([a_notebook(tmp_path / "a.ipynb", [])], out)
    report.write_macros({"a": "b"}, out)
    with pytest.raises(UserError, match=message) as error:
        report.build_pdf(a_report(tmp_path / "report", body), out, tmp_path / "report.pdf")
    assert "\n" not in str(error.value) and "report.log" in str(error.value)
    assert (tmp_path / "report.log").exists() and not (tmp_path / "report.pdf").exists()


def test_without_latexmk_the_error_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="sudo apt-get install latexmk"):
        report.build_pdf(report.REPORT, tmp_path, tmp_path / "report.pdf")


def test_values_are_in_per_cent_and_words_follow_the_numbers():
    settings = {"temperature": 4.0, "train_size": 9000, "seeds": [0, 1, 2], "max_shift": 4, "shift_step": 4,
                "epochs": 1, "weights": "none", "resnet50_trainable": "last_layer",
                "optimizer": "adamw"}  # fmt: skip
    values = report.result_values(some_results(), {"settings": settings, "data": {"name": "x"}})
    assert values["kd/resnet50/test/accuracy/pm"] == "71.00 ± 1.00"
    assert values["scratch//test/accuracy/seeds"] == "3 seeds" and values["scratch//test/nll/mean"] == "0.312"
    assert values["teacher/resnet50/test/accuracy/mean"] == "80.50"
    assert values["gap/resnet50"] == "+11.67"
    assert report.result_values(some_results(scratch=(0.9, 0.9)), {"settings": settings})["gap/resnet50"] == "−9.50"
    assert values["settings/temperature"] == "4" and values["settings/train_size"] == "9,000"
    assert values["settings/optimizer"] == "AdamW" and values["data/name"] == "x"
    assert values["words/views"] == "18 views" and values["words/epochs"] == "1 epoch"
    assert values["resnet50/trainable-words"] == "the whole network"


def test_the_prose_rounds_a_mean_as_the_notebooks_tables_do():
    accuracies = (0.1175, 0.126)  # their mean in per cent lies between two roundings
    values = report.result_values(some_results(scratch=accuracies), {"settings": {"epochs": 2}})
    assert values["scratch//test/accuracy/pm"] == spread(accuracies, percent=True) == "12.18 ± 0.60"


def test_the_best_student_is_the_best_on_validation_images():
    test = some_results()
    val = test.assign(split="val", value=test.value.where(test.arm != "scratch", 0.99))
    values = report.result_values(pd.concat([test, val]), {"settings": {"epochs": 2}})
    assert values["best/words"] == "student from scratch" and values["best/pm"] == values["scratch//test/accuracy/pm"]


def test_how_many_images_had_no_label():
    results = some_results()
    everything = results[results.arm == "scratch"].assign(arm="scratch_all_labels", task="extra", labels=5100)
    settings = {"epochs": 2, "train_size": 100}
    assert report.result_values(pd.concat([results, everything]), {"settings": settings})["words/unlabelled"] == "5,000"
    assert "words/unlabelled" not in report.result_values(results, {"settings": settings})


def test_what_stays_on_one_line():
    assert report.tex("n = 5, p = 0.02 (α = 0.5, x = y)") == r"n~=~5, p~=~0.02 (\ensuremath{\alpha}~=~0.5, x = y)"


def test_other_budgets_have_values_of_their_own():
    main = some_results()
    long = main[main.task != 2].assign(epochs=9, value=lambda rows: rows.value + 0.1)
    extra = main[main.task == 1].assign(task="extra", epochs=5, value=0.5)
    everything = pd.concat([main, long, extra, main[main.task == 2].assign(arm="last_block", value=0.9)])
    settings = {"epochs": 2, "resnet50_trainable": "last_layer"}
    values = report.result_values(everything, {"settings": settings})
    assert values.items() >= report.result_values(main, {"settings": settings}).items()
    assert values["long/kd/resnet50/test/accuracy/mean"] == "81.00" and values["words/long_epochs"] == "9 epochs"
    assert values["extra/scratch//test/accuracy/mean"] == "50.00"
    with pytest.raises(UserError, match="scratch was run for .2, 9. epochs, and none of them is the report's 3"):
        report.result_values(everything, {"settings": {"epochs": 3}})


def test_the_report_makes_every_claim_and_no_other():
    source = (report.REPORT / "report.tex").read_text(encoding="utf-8").partition(r"\begin{document}")[2]
    assert set(re.findall(r"\\claim{([a-z0-9-]+)}", source)) == {claim.name for claim in CLAIMS}
    assert set(re.findall(r"\\ifval{group/(\w+)}", source)) == {claim.group for claim in CLAIMS} - {CORE} | {"study"}


def test_readme_holds_the_table_between_its_marks_however_often_it_is_updated(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    table = report.results_table(some_results())
    tables = {"": table, "More": table.iloc[:1]}
    report.update_readme(readme, tables, "Made with α = 0.8.")
    once = readme.read_text(encoding="utf-8")
    report.update_readme(readme, tables, "Made with α = 0.8.")
    assert readme.read_text(encoding="utf-8") == once
    assert once.startswith("before\n") and once.endswith("after\n")
    assert "old" not in once and "α = 0.8" in once
    assert "| 3 | Student distilled from one teacher | ResNet-50 | 71.00 ± 1.00 | 3 |" in once
    assert "| 2 | ResNet-50, last layer fine-tuned | – | 80.50 ± 0.71 | 2 |" in once
    assert once.count("<details><summary>More</summary>\n\n| Task") == once.count("\n\n</details>") == 1


def test_the_pictures_that_a_readme_shows_are_the_notebooks_figures(tmp_path):
    def shown(name, **data):
        metadata = {"kdutils": {"name": name}}
        return nbformat.v4.new_output(
            "display_data", {kind.replace("_", "/"): value for kind, value in data.items()}, metadata=metadata
        )

    outputs = [shown("curves", image_png="QUJD"), shown("other", image_png="REVG"), shown("words", text_html="<b>")]
    cells = [nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("x", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    readme, pictures = tmp_path / "README.md", tmp_path / "docs" / "pictures"
    readme.write_text("![](docs/pictures/curves.png) ![](docs/pictures/words.png) ![](docs/pictures/screenshot.png)")
    pictures.mkdir(parents=True)
    (pictures / "screenshot.png").write_bytes(b"mine")
    report.update_pictures(readme, [tmp_path / "a.ipynb"])
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == {
        "curves.png": b"ABC",
        "screenshot.png": b"mine",
    }


def test_the_results_table_shows_once_what_a_later_task_repeats():
    results = some_results()
    again, new = (
        results[results.arm == "scratch"].assign(task="extra"),
        results[results.arm == "kd"].assign(arm="other"),
    )
    repeated = pd.concat([again, results, new.assign(task="extra")])
    found = report.results_table(repeated)
    assert found.iloc[:-1].equals(report.results_table(results))
    assert found.iloc[-1][["Task", "Model"]].tolist() == ["extra", "Other"]
    longer = pd.concat([results, again.assign(epochs=9)])
    assert len(report.results_table(longer)) == len(report.results_table(results)) + 1


def test_a_readme_without_marks_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="results:begin"):
        report.update_readme(tmp_path / "README.md", {"": report.results_table(some_results())})
