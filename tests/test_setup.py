"""What installs and starts the project: requirements.txt, constraints.txt, pyproject.toml, Makefile."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {"distributed"}  # an extra of pyproject.toml
PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml"}  # where the import's name is another one than the package's
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def read_requirements(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def names(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imported_packages():
    """Top-level names of the third-party modules that kdutils imports, as packages of the index."""
    found = set()
    for path in (ROOT / "kdutils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    found -= sys.stdlib_module_names | {"kdutils"}
    return {canonicalize_name(PACKAGE_OF.get(name, name)) for name in found}


def test_requirements_hold_lower_bounds_only():
    """A pin or an upper bound would make pip replace what Colab ships, its torch above all."""
    requirements = read_requirements("requirements.txt")
    assert {"torch", "torchvision"} <= names(requirements)
    for requirement in requirements:
        assert {specifier.operator for specifier in requirement.specifier} == {">="}, requirement
        assert not requirement.url and not requirement.marker


def test_every_import_is_required():
    assert imported_packages() - OPTIONAL <= names(read_requirements("requirements.txt"))


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_requirement_once(python):
    pins = [pin for pin in read_requirements("constraints.txt")
            if pin.marker is None or pin.marker.evaluate({"python_version": python})]  # fmt: skip
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins) and all(str(pin.specifier).startswith("==") for pin in pins)
    required = read_requirements("requirements.txt")
    assert names(required) | {"pytest", "hypothesis", *OPTIONAL} <= versions.keys()
    for requirement in required:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_every_subpackage_is_installed():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "kdutils").rglob("__init__.py")}
    listed = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {*ast.literal_eval(listed[1])} == packages


def test_ruff_is_the_same_by_hand_and_before_a_commit():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revision = next(hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit"))
    pin = next(pin for pin in read_requirements("constraints.txt") if pin.name == "ruff")
    assert str(pin.specifier) == f"=={revision.removeprefix('v')}"


def run_make(*arguments, **options):
    """make, as typed in a fresh shell (not as a child of the make that runs these tests)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    environment |= options.pop("environment", {})
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], env=environment, capture_output=True, text=True, **options
    )


@make
@pytest.mark.parametrize("target", [
    "help", "setup", "tex", "demo", "report", "pdf", "test", "test-other-cpu", "soak", "bench", "stamp ADDRESS=x", "clean",
    "distclean",
])  # fmt: skip
def test_targets_can_be_made(target):
    result = run_make("-C", str(ROOT), "-n", *target.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and not result.stderr.strip()


@make
def test_help_is_the_default_and_names_real_targets():
    shown = run_make(cwd=ROOT).stdout
    assert shown == run_make("help", cwd=ROOT).stdout
    defined = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", shown))
    assert {"setup", "demo", "report", "pdf", "test", "clean"} <= named <= defined


@make
@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_cleaning_spares_data_weights_and_runs(target):
    recipe = run_make("-C", str(ROOT), "-n", target).stdout
    assert not re.search(r"\b(data|weights|runs)\b", recipe)
    assert (".venv" in recipe) == (target == "distclean")


@pytest.fixture
def checkout(tmp_path):
    """A copy whose path holds a space, set up; its Python only prints its arguments, one a line."""
    root = tmp_path / "my copy"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ["Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"]:
        shutil.copy(ROOT / name, root)
    python = root / ".venv" / "bin" / "python"
    latexmk = tmp_path / "bin" / "latexmk"  # there, so that nothing is installed
    latexmk.parent.mkdir()
    for path, text in [(python, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n"), (latexmk, "#!/bin/sh\n")]:
        path.write_text(text)
        path.chmod(0o755)
    (root / ".venv" / ".stamp-setup").write_text(str(root.resolve()))
    return root


def run_in(checkout, *arguments, environment={}):
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return run_make("-s", "-C", str(checkout), *arguments, environment={"PATH": path, **environment})


@make
def test_setup_does_nothing_the_second_time(checkout):
    result = run_in(checkout, "setup")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@make
def test_setup_follows_a_moved_folder(checkout):
    moved = checkout.rename(checkout.with_name("moved"))
    assert "venv --clear" in run_in(moved, "-n", "setup").stdout


@make
@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_an_unfit_python_is_one_clear_message(checkout, python):
    (checkout / ".venv" / ".stamp-setup").unlink()
    result = run_in(checkout, "setup", f"PYTHON={python}")
    assert result.returncode != 0
    assert "needs Python 3.10 or later" in result.stderr and "make setup PYTHON=" in result.stderr


def bare_machine(checkout, who):
    """A PATH with no TeX. Its apt-get keeps a log and brings latexmk; `nobody` has no right to call it."""
    folder = checkout.parent / f"bare {who}"
    folder.mkdir()
    for tool in ["cat", "chmod", "env", "touch", "true"]:
        (folder / tool).symlink_to(shutil.which(tool))
    scripts = {
        "id": f"echo {0 if who == 'root' else 1000}",
        "sudo": "exit 1" if who == "nobody" else 'shift; exec "$@"',
        "apt-get": f"echo \"$@\" >>'{folder}/log'; touch '{folder}/latexmk'; chmod +x '{folder}/latexmk'",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def make_on(machine, checkout, *arguments):
    command = [shutil.which("make"), "-s", "--no-print-directory", "-C", str(checkout), *arguments]
    return subprocess.run(command, env={"PATH": str(machine)}, capture_output=True, text=True)


@make
@pytest.mark.parametrize("who", ["root", "sudo"])
def test_tex_is_installed_where_that_needs_no_password(checkout, who):
    machine = bare_machine(checkout, who)
    result = make_on(machine, checkout, "setup")
    assert (result.returncode, result.stderr) == (0, "") and "sudo apt-get" not in result.stdout
    updated, installed = (machine / "log").read_text().splitlines()
    assert updated.endswith("update") and " install -y --no-install-recommends latexmk " in installed
    assert make_on(machine, checkout, "setup").stdout == ""


@make
def test_without_tex_the_rest_goes_on(checkout):
    machine = bare_machine(checkout, "nobody")
    result = make_on(machine, checkout, "demo")
    assert result.returncode == 0 and not (machine / "log").exists()
    assert "sudo apt-get install --no-install-recommends latexmk" in result.stdout
    assert result.stdout.splitlines()[-6:] == ["-m", "kdutils", "run", "--profile", "demo", "--report"]


@make
def test_a_python_without_venv_gets_the_command_to_type(checkout):
    (checkout / ".venv" / ".stamp-setup").unlink()
    python = checkout.parent / "python3.10"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *-venv*) echo python3.10-venv;; esac\n')
    python.chmod(0o755)
    result = make_on(bare_machine(checkout, "nobody"), checkout, "setup", f"PYTHON={python}")
    assert result.returncode != 0
    assert "sudo apt-get install python3.10-venv" in result.stderr


@make
def test_report_hands_every_value_on_whole(checkout):
    values = ["PROFILE=mine", "DATA=folder:my data/it's", "DATA_NAME=My ten classes", "WEIGHTS=my weights"]
    result = run_in(checkout, "report", *values, 'PARAMS=-p epochs 60 -p seeds "[0, 1]"')
    given = [["data", "folder:my data/it's"], ["data_name", "My ten classes"], ["weights", "my weights"],
             ["epochs", "60"], ["seeds", "[0, 1]"]]  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "-m", "kdutils", "run", "--profile", "mine", *sum([["-p", *pair] for pair in given], []), "--report", "--out", "report",
    ]  # fmt: skip


@make
def test_stamp_hands_on_the_address_and_asks_for_one(checkout):
    address = "https://github.com/me/it's"
    assert run_in(checkout, "stamp", f"ADDRESS={address}").stdout.splitlines() == ["-m", "kdutils", "stamp", address]
    with_ref = run_in(checkout, "stamp", f"ADDRESS={address}", "REF=main").stdout.splitlines()
    assert with_ref[3:] == [address, "--ref", "main"]
    result = run_in(checkout, "stamp")
    assert result.returncode != 0 and "make stamp ADDRESS=https://" in result.stderr


@make
def test_the_other_processor_is_one_that_this_is_not(checkout):
    """The numerical tests run with kernels that torch has, and that are not those it takes here."""
    python = checkout / ".venv" / "bin" / "python"
    kernels = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -W error -c '{kernels}'\n")
    here = subprocess.run([sys.executable, "-c", kernels], capture_output=True, text=True).stdout.strip()
    result = run_in(checkout, "test-other-cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] in {"AVX2", "DEFAULT"} - ({here} if here != "DEFAULT" else set())


@make
def test_variables_of_the_surrounding_shell_do_not_leak(checkout):
    shown = run_in(checkout, "report", environment={"DATA": "x", "PARAMS": "-p y 1"}).stdout.splitlines()
    assert shown[:5] == ["-m", "kdutils", "run", "--profile", "cifar10"] and "-p" not in shown


@make
def test_clean_leaves_what_is_not_its_own(checkout):
    kept = ["data/a.log", "weights/b.aux", "runs/demo/__pycache__/c", "report/report.tex", "report/generated/d.tex",
            ".venv/bin/python", "kdutils/e.py"]  # fmt: skip
    gone = ["report/report.aux", "report/report.latex/x.pdf", "kdutils/__pycache__/y.pyc", ".pytest_cache/z"]
    for name in kept + gone:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert run_in(checkout, "clean").returncode == 0
    assert [name for name in kept if not (checkout / name).exists()] == []
    assert [name for name in gone if (checkout / name).exists()] == []
    assert run_in(checkout, "distclean").returncode == 0
    assert [name for name in kept if not (checkout / name).exists()] == [".venv/bin/python"]
