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

from kdutils.report import show
from kdutils.report.batch import macros
from kdutils.report.claims import CLAIMS, CORE
from kdutils.report.latex import REPORT, build_pdf, export_notebooks, result_values, write_macros
from kdutils.report.readme import update_pictures, update_readme
from kdutils.results import figures
from kdutils.results.tables import results_table, spread
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
    monkeypatch.setattr(show, "display", lambda data, raw, metadata: outputs.append((data, metadata)))
    return outputs


def a_figure():
    fig, axes = plt.subplots(figsize=(3, 2))
    axes.plot([1, 2, 3])
    return fig


def a_notebook(path, outputs, cells=()):
    """An executed notebook (format 4.5) with the outputs (bundle, metadata), each in its own cell."""
    shows = [
        new_code_cell(f"show(50 % {i}, 'α_é')  # {{x}}", execution_count=i, outputs=[
            new_output("display_data", data=data, metadata=metadata)])
        for i, (data, metadata) in enumerate(outputs, start=1)
    ]  # fmt: skip
    nb = new_notebook(cells=[new_markdown_cell("# A title\n\n## Part 50% of `it`"), *shows, *cells])
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.validate(nb)
    nbformat.write(nb, path)
    return path


def a_report(folder, body):
    """A folder with the preamble of the real report.tex around another body."""
    preamble = (REPORT / "report.tex").read_text(encoding="utf-8").partition(r"\begin{document}")[0]
    folder.mkdir()
    (folder / "report.tex").write_text(rf"{preamble}\begin{{document}}{body}\end{{document}}", encoding="utf-8")
    shutil.copy(REPORT / "references.bib", folder)
    return folder


TEACHERS = [
    {"name": "resnet50", "label": "R 50", "weights": "none", "trainable": "last_layer", "size": 64, "epochs": 1,
     "optimizer": "adamw", "views": 18, "batch_size": 128, "schedule": "one_cycle", "learning_rate": 0.003,
     "weight_decay": 0.05, "label_smoothing": 0.0},
]  # fmt: skip
TEACHERS.append(TEACHERS[0] | {"name": "resnet18", "label": "resnet18", "weights": "imagenet", "folds": 3})
SETTINGS = {"epochs": 2, "teachers": TEACHERS}


def some_results(kd=(0.70, 0.71, 0.72), scratch=(0.68, 0.69, 0.695)):
    arms = [(1, "scratch", "", scratch), (2, "last_layer", "R 50", (0.8, 0.81)), (3, "kd", "R 50", kd)]
    rows = [
        (*arm, 100, 2, seed, "test", metric, value if metric == "accuracy" else 1 - value)
        for *arm, values in arms for seed, value in enumerate(values) for metric in ("accuracy", "nll", "ece")
    ]  # fmt: skip
    return pd.DataFrame(rows, columns="task arm teachers labels epochs seed split metric value".split())


def test_a_figure_is_one_bundle_with_its_caption_and_is_closed(shown):
    fig = a_figure()
    show.show_figure(fig, "curves", NASTY, note="Generated data.")
    assert not plt.fignum_exists(fig.number)
    [(data, metadata)] = shown
    caption = f"{NASTY} Generated data."
    assert metadata == {"kdutils": {"kind": "figure", "name": "curves", "caption": caption}}
    assert set(data) == {"image/png", "application/pdf", "text/plain"}
    show.show_figure(a_figure(), "curves", NASTY)
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
    show.show_figure(fig, "curves", "gist")
    with_caption = base64.b64decode(shown[0][0]["image/png"])
    assert bands(with_caption) == bands(plain.getvalue()) + sticks_out + 1


def test_a_table_is_html_and_booktabs_with_numbers_to_the_right(shown):
    row = {"Class_": "cat & dog", "n": 9000, "Accuracy": "68.60 ± 0.21", "NLL": None}
    show.show_table(pd.DataFrame([row]), "scores", NASTY)
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
                          "Difference": ["–", "+1.33 [+0.86, +1.80]", "−0.42 [−1.23, +0.39]", "–"]})  # fmt: skip
    show.show_table(frame, "scores", "caption")
    text = shown[0][0]["text/latex"]
    assert r"\begin{tabular}{rrr}" in text
    assert r"1.020~±~\phantom{0}0.007 & 5 &" in text
    assert r"79.49\phantom{0}~±~10.45\phantom{7} & 10 &" in text
    assert r"70.1\phantom{20}\phantom{~±~10.007} & 3 &" in text
    assert r"–\phantom{.020}\phantom{~±~10.007} & 1 & – \\" in text


@pytest.mark.parametrize("name", ["", "Curves", "a b", "a_b", "a/b", None])
def test_a_name_of_other_characters_is_an_error(name, shown):
    with pytest.raises(UserError, match="a-z, 0-9 and -"):
        show.show_table(pd.DataFrame({"a": [1]}), name, "caption")
    assert shown == []


def test_a_name_used_twice_is_an_error_that_names_both_places(tmp_path, shown):
    show.show_figure(a_figure(), "curves", "caption")
    one, two = (a_notebook(tmp_path / name, shown) for name in ("01_one.ipynb", "02_two.ipynb"))
    with pytest.raises(UserError, match="'curves' is used in 01_one.ipynb, cell 2 and in 02_two.ipynb"):
        export_notebooks([one, two], tmp_path / "generated")
    assert not (tmp_path / "generated").exists()


def test_an_export_removes_what_an_earlier_one_left_but_not_the_macros(tmp_path, shown):
    out = tmp_path / "generated"
    write_macros({"a": "b"}, out)
    for name in ("old", "new"):
        show.show_figure(a_figure(), name, "caption")
        export_notebooks([a_notebook(tmp_path / f"{name}.ipynb", shown[-1:])], out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"macros.tex", "notebooks.tex", "new.tex", "new-code.tex", "figures/new.pdf"}


@needs_tex
@pytest.mark.filterwarnings("ignore:Glyph")
def test_captions_cells_values_and_code_are_typeset_as_they_are(tmp_path, shown):
    show.show_figure(a_figure(), "curves", NASTY + " αβ ≤ 猫")
    show.show_table(pd.DataFrame({NASTY: [NASTY], "n": [1.5]}), "scores", NASTY)
    out = tmp_path / "generated"
    export_notebooks([a_notebook(tmp_path / "01_nasty_name.ipynb", shown)], out)
    write_macros({"some/key_1": '68.60 ± 0.21 −1.00 --seeds "q"', "command": "run -p seeds '[0]'"}, out)
    body = r"\putfloat{curves}\putfloat{scores} \val{some/key_1} \val{command} \tab{scores} \foreachnotebook{-code}"
    folder = a_report(tmp_path / "report", body)
    build_pdf(folder, out, tmp_path / "a.pdf")
    build_pdf(folder, out, tmp_path / "b.pdf")
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
    export_notebooks([a_notebook(tmp_path / "a.ipynb", [])], out)
    write_macros({"a": "b"}, out)
    with pytest.raises(UserError, match=message) as error:
        build_pdf(a_report(tmp_path / "report", body), out, tmp_path / "report.pdf")
    assert "\n" not in str(error.value) and "report.log" in str(error.value)
    assert (tmp_path / "report.log").exists() and not (tmp_path / "report.pdf").exists()


def test_without_latexmk_the_error_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="sudo apt-get install latexmk"):
        build_pdf(REPORT, tmp_path, tmp_path / "report.pdf")


def test_values_are_in_per_cent_and_words_follow_the_numbers():
    settings = {"temperature": 4.0, "train_size": 9000, "seeds": [0, 1, 2], "max_shift": 4, "shift_step": 4,
                "epochs": 1, "optimizer": "adamw", "teachers": TEACHERS}  # fmt: skip
    values = result_values(some_results(), {"settings": settings, "data": {"name": "x"}})
    assert values["kd/first/test/accuracy/pm"] == "71.00 ± 1.00" == values["kd/better/test/accuracy/pm"]
    assert values["scratch//test/accuracy/seeds"] == "3 seeds" and values["scratch//test/nll/mean"] == "0.312"
    assert values["teacher/first/test/accuracy/mean"] == "80.50"
    assert values["gap/first"] == "+11.67" and "gap/second" not in values
    assert result_values(some_results(scratch=(0.9, 0.9)), {"settings": settings})["gap/first"] == "−9.50"
    assert values["settings/temperature"] == "4" and values["settings/train_size"] == "9,000"
    assert values["settings/optimizer"] == "AdamW" and values["data/name"] == "x"
    assert values["words/views"] == "18 views" and values["words/epochs"] == "1 epoch"


def test_the_report_names_teachers_by_role_and_their_settings_by_label():
    facts = {"resnet18": {"description": "ImageNet-1k", "views_trained": 6}}
    values = result_values(some_results(), {"settings": SETTINGS, "weights": facts, "better_teacher": "resnet18"})
    assert values["first/full-name"] == "R 50 (ResNet-50)" and values["first/name"] == "R 50"
    assert values["second/full-name"] == values["better/name"] == "ResNet-18" and values["lesser/name"] == "R 50"
    assert values["first/trained"] == "the whole network" and values["second/trained"] == "the last layer"
    assert values["first/recipe"].startswith("1 epoch of AdamW on 18 views, batches of 128, a one-cycle schedule with")
    assert "on 6 views" in values["second/recipe"] and values["second/recipe"].endswith("cross-fitted in 3 folds")
    assert values["second/pretraining"] == "ImageNet-1k" and "first/pretraining" not in values
    assert values["settings/teachers/R-50/size"] == "64"
    agreement = (
        some_results().query("arm == 'kd' and metric == 'accuracy'").assign(metric="agreement_R 50_teacher_wrong")
    )
    values = result_values(pd.concat([some_results(), agreement]), {"settings": SETTINGS})
    assert values["kd/first/test/agreement_first_teacher_wrong/mean"] == "71.00"


def test_the_prose_rounds_a_mean_as_the_notebooks_tables_do():
    accuracies = (0.1175, 0.126)  # their mean in per cent lies between two roundings
    values = result_values(some_results(scratch=accuracies), {"settings": {"epochs": 2}})
    assert values["scratch//test/accuracy/pm"] == spread(accuracies, percent=True) == "12.18 ± 0.60"


def test_the_best_student_is_the_best_on_validation_images_and_no_control_with_more_labels():
    test = some_results()
    control = test[test.arm == "scratch"].assign(arm="scratch_all_labels", value=0.9)
    test = pd.concat([test, control])
    val = test.assign(split="val", value=test.value.where(test.arm != "scratch", 0.89))
    values = result_values(pd.concat([test, val]), {"settings": SETTINGS})
    assert values["best/words"] == "student from scratch" and values["best/pm"] == values["scratch//test/accuracy/pm"]


def test_what_stays_on_one_line():
    assert show.tex("n = 5, p = 0.02 (α = 0.5, x = y)") == r"n~=~5, p~=~0.02 (\ensuremath{\alpha}~=~0.5, x = y)"


def test_other_numbers_of_epochs_have_values_of_their_own():
    main = some_results()
    long = main[main.task != 2].assign(epochs=9, value=lambda rows: rows.value + 0.1)
    unlabelled = main[main.task == 3].assign(arm="kd_unlabelled", epochs=5)
    everything = pd.concat([main, long, unlabelled])
    values = result_values(everything, {"settings": SETTINGS})
    assert values.items() >= result_values(main, {"settings": SETTINGS}).items()
    assert values["long/kd/first/test/accuracy/mean"] == "81.00" and values["words/long_epochs"] == "9 epochs"
    assert values["kd_unlabelled/better/test/accuracy/mean"] == "71.00"
    with pytest.raises(UserError, match="scratch was run for .2, 9. epochs, and none of them is the report's 3"):
        result_values(everything, {"settings": SETTINGS | {"epochs": 3}})


def test_of_two_variants_of_a_teacher_the_one_of_the_settings_teaches():
    results = pd.concat([some_results(), some_results().query("task == 2").assign(arm="all", value=0.9)])
    assert result_values(results, {"settings": SETTINGS})["teacher/first/test/accuracy/mean"] == "90.00"


def test_the_report_makes_every_claim_and_no_other():
    source = (REPORT / "report.tex").read_text(encoding="utf-8").partition(r"\begin{document}")[2]
    named = {claim.name for claims in CLAIMS.values() for claim in claims} - {"kd-*"} | {"kd-first", "kd-second"}
    assert set(re.findall(r"\\(?:maybe)?claim{([a-z0-9-]+)}", source)) == named
    assert set(re.findall(r"\\ifval{group/(\w+)}", source)) == {*CLAIMS, "study", "smoothing"} - {CORE}


def test_the_first_page_tells_of_weak_teachers_and_stand_in_weights_once():
    provenance = {"settings": SETTINGS, "data": {"name": "x", "is_generated": False, "is_cifar10": False},
                  "weights": {"R 50": {"description": "of mine", "is_standin": True, "views_trained": 1},
                              "resnet18": {"description": "of ImageNet", "is_standin": False, "views_trained": 1}},
                  "better_teacher": "R 50"}  # fmt: skip
    weak = some_results(scratch=(0.9, 0.9, 0.9))
    both = weak[weak.arm == "kd"].assign(arm="kd_mean_prob", teachers="R 50+resnet18")
    other = weak[weak.arm == "kd"].assign(teachers="resnet18")
    weak = pd.concat([weak, both, other, weak[weak.arm == "scratch"].assign(split="val")])
    values = macros(weak, provenance)
    assert "the teacher R 50 (80.5 %) is worse than the student from scratch (90.0 %)" in values["notice/teachers"]
    assert values["notice/weights"] == "Teachers without ImageNet's weights. R 50: of mine."
    assert values["words/unlabelled"] == "no" and "CIFAR-10 itself" in values["notice/data"]
    provenance["data"] |= {"is_cifar10": True, "unlabelled": 40000}
    provenance["weights"].pop("R 50")
    good = macros(weak.assign(value=weak.value.where(weak.arm != "scratch", 0.5)), provenance)
    assert not any(good[f"notice/{name}"] for name in ("teachers", "weights", "data"))
    assert good["words/unlabelled"] == "40,000"


def test_readme_holds_the_table_between_its_marks_however_often_it_is_updated(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    table = results_table(some_results())
    tables = {"": table, "More": table.iloc[:1]}
    update_readme(readme, tables, "Made with α = 0.8.")
    once = readme.read_text(encoding="utf-8")
    update_readme(readme, tables, "Made with α = 0.8.")
    assert readme.read_text(encoding="utf-8") == once
    assert once.startswith("before\n") and once.endswith("after\n")
    assert "old" not in once and "α = 0.8" in once
    assert "| 3 | Student distilled from one teacher | R 50 | 71.00 ± 1.00 | 3 |" in once
    assert "| 2 | R 50, last layer fine-tuned | – | 80.50 ± 0.71 | 2 |" in once
    assert once.count("<details><summary>More</summary>\n\n| Task") == once.count("\n\n</details>") == 1


def test_the_pictures_that_a_readme_shows_are_the_notebooks_figures(tmp_path):
    bundles = {"curves": {"image/png": "QUJD"}, "other": {"image/png": "REVG"}, "words": {"text/html": "<b>"}}
    a_notebook(tmp_path / "a.ipynb", [(data, {"kdutils": {"name": name}}) for name, data in bundles.items()])
    readme, pictures = tmp_path / "README.md", tmp_path / "docs" / "pictures"
    readme.write_text("![](docs/pictures/curves.png) ![](docs/pictures/words.png) ![](docs/pictures/screenshot.png)")
    pictures.mkdir(parents=True)
    (pictures / "screenshot.png").write_bytes(b"mine")
    update_pictures(readme, [tmp_path / "a.ipynb"])
    found = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert found == {"curves.png": b"ABC", "screenshot.png": b"mine"}


def test_the_results_table_shows_once_what_a_later_task_repeats():
    results = some_results()
    again = results[results.arm == "scratch"].assign(task="extra")
    new = results[results.arm == "kd"].assign(arm="other", task="extra")
    found = results_table(pd.concat([again, results, new]))
    assert found.iloc[:-1].equals(results_table(results))
    assert found.iloc[-1][["Task", "Model"]].tolist() == ["extra", "Other"]
    longer = pd.concat([results, again.assign(epochs=9)])
    assert len(results_table(longer)) == len(results_table(results)) + 1
