# make, or make help: what can be done here, by example.

PYTHON = python3
PROFILE = cifar10
DATA =
DATA_NAME =
WEIGHTS =
PARAMS =
ADDRESS =
REF =

quote = '$(subst ','\'',$(1))'
run = .venv/bin/python -m kdutils
params = $(if $(DATA),-p data $(call quote,$(DATA))) \
	$(if $(DATA_NAME),-p data_name $(call quote,$(DATA_NAME))) \
	$(if $(WEIGHTS),-p weights $(call quote,$(WEIGHTS))) $(PARAMS)

tex_packages = latexmk texlive-latex-extra lmodern poppler-utils
apt_get = apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60
# Installs packages where that can be done without asking for a password, fails at once otherwise.
apt_install = { command -v apt-get && { test "$$(id -u)" = 0 || sudo -n true; }; } >/dev/null 2>&1 && \
	as_root=$$(test "$$(id -u)" = 0 || echo sudo -n) && \
	{ $$as_root $(apt_get) update; \
	$$as_root env DEBIAN_FRONTEND=noninteractive $(apt_get) install -y --no-install-recommends $(1) >/dev/null; }

# The stamp holds the folder it was made in: the environment of a folder that has moved is made again.
stamp = .venv/.stamp-setup

.PHONY: help setup tex demo report pdf test test-other-cpu soak bench stamp clean distclean
ifneq ($(shell cat $(stamp) 2>/dev/null),$(CURDIR))
.PHONY: $(stamp)
endif

help:
	@echo 'make demo      the four notebooks on generated images, no download but packages: runs/demo/report.pdf'
	@echo 'make report    the same on CIFAR-10, downloaded when absent: report/report.pdf'
	@echo 'make pdf       typeset report/generated again: no data, no training'
	@echo 'make test      the tests'
	@echo 'make soak      runs killed at 200 random moments, and more: the results must be the same bytes; half an hour'
	@echo 'make bench     how fast this is here, against the plain way of doing it; ten minutes'
	@echo 'make stamp     write the address of your repository into the notebooks: make stamp ADDRESS=https://...'
	@echo 'make setup     only .venv (pinned packages) and TeX; the targets above do it when needed'
	@echo 'make clean     remove caches and LaTeX leftovers; make distclean: .venv too'
	@echo
	@echo 'Your own ten classes, in FOLDER/train/CLASS/* and FOLDER/test/CLASS/*:'
	@echo '    make report DATA=folder:data/pets DATA_NAME="my pets"'
	@echo 'Weights from a folder, with NAME.safetensors or NAME.pth for each teacher, instead of a download:'
	@echo '    make report WEIGHTS=weights'
	@echo 'Your own two teachers, by their names in torchvision or timm:'
	@echo '    make demo PARAMS="-p teachers [tf_efficientnet_lite0,resnet18]"'
	@echo 'Any parameter of the notebooks:'
	@echo '    make report PARAMS="-p epochs 60 -p temperature 2"'
	@echo '    make demo PARAMS="-p seeds [0]"'
	@echo 'Another profile of notebooks/profiles; another Python:'
	@echo '    make report PROFILE=cifar10-lite DATA=folder:data/cifar10-jpeg'
	@echo '    make setup PYTHON=python3.12'
	@echo 'The tables of a run; a picture classified by one of its students; that student as a file:'
	@echo '    .venv/bin/python -m kdutils results --profile demo'
	@echo '    .venv/bin/python -m kdutils predict --profile demo cat.png'
	@echo '    .venv/bin/python -m kdutils export --profile demo --format torchscript'

setup: $(stamp) tex

$(stamp): requirements.txt constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "kdutils needs Python 3.10 or later; $(PYTHON) is: $$("$(PYTHON)" --version 2>&1)"; \
		echo 'Name one that is there, for example: make setup PYTHON=python3.12'; exit 1; } >&2
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		package=$$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "Installing $$package, which $(PYTHON) needs to make virtual environments"; \
		$(call apt_install,"$$package") || { \
		echo "It could not be installed. Type: sudo apt-get install $$package"; exit 1; } >&2; }
	@echo 'Setting up .venv: pinned packages, a few minutes the first time'
	@{ test ! -s $@ || test "$$(cat $@)" = $(call quote,$(CURDIR)); } && \
		.venv/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@printf '%s' $(call quote,$(CURDIR)) >$@

tex:
	@command -v latexmk >/dev/null || { \
		echo 'Installing TeX, for the PDF'; \
		$(call apt_install,$(tex_packages)) && command -v latexmk >/dev/null; } || { \
		echo 'No latexmk: all but the PDF will be made. For the PDF, type:'; \
		echo '    sudo apt-get update && sudo apt-get install --no-install-recommends $(tex_packages)'; }

demo: setup
	$(run) run --profile demo $(params) --report

report: setup
	$(run) run --profile $(call quote,$(PROFILE)) $(params) --report --out report

pdf: setup
	$(run) report --pdf-only --out report

# Two processes of one thread each: tests are many small things, and threads that wait for each other cost more than they give.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# These compare numbers, whose last bits depend on the processor. It cannot be made newer than it is, but older.
numerical_tests = $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
	numbers views losses weights models training teachers students cache predict metrics)))
test-other-cpu: $(stamp)
	@if grep -qs avx512f /proc/cpuinfo; then set -- avx2 AVX2 AVX2; else set -- default SSE41 SSE4_2; fi; \
	echo "The numerical tests again, with the instructions of another processor: $$1"; \
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 \
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(numerical_tests)

soak: setup
	.venv/bin/python -m pytest -q -s -m soak

bench: $(stamp)
	$(run) bench --profile $(call quote,$(PROFILE)) $(params)

stamp: $(stamp)
	@test -n $(call quote,$(ADDRESS)) || { \
		echo 'Name the repository: make stamp ADDRESS=https://github.com/OWNER/REPO'; exit 1; } >&2
	$(run) stamp $(call quote,$(ADDRESS)) $(if $(REF),--ref $(call quote,$(REF)))

clean:
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache build kdutils.egg-info report/report.latex
	rm -f $(foreach ext,aux bbl blg fdb_latexmk fls lof log lot out synctex.gz toc,report/*.$(ext))
	find $(wildcard kdutils tests notebooks report) -type d \
		'(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
