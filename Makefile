# Each target installs its requirements in .venv and reuses existing files.
PYTHON ?= python3
PY := .venv/bin/python
DIGITS := work_dirs/vvt-nano_digits
DIGITS_CONFIG := configs/demo/vvt-nano_digits.py

SCENES := work_dirs/vvt-nano_fpn_digit-scenes
SCENES_CONFIG := configs/demo/vvt-nano_fpn_digit-scenes.py

BOXES := work_dirs/retinanet_vvt-nano_digit-scenes
BOXES_CONFIG := configs/demo/retinanet_vvt-nano_digit-scenes.py

.PHONY: help demo demo-seg demo-det test test-fast test-kill fuzz lint compat docs install clean

help:
	@echo "make demo      train and test a small VVT on handwritten digits"
	@echo "make demo-seg  segment handwritten digits on photographs"
	@echo "make demo-det  find handwritten digits on photographs"
	@echo "make test      install everything, mmcv's compiled ops too, and run the tests"
	@echo "make test-fast run the tests marked fast, in under 90 seconds"
	@echo "make test-kill kill training at random moments and resume it, 40 times"
	@echo "make fuzz      read 10 000 damaged and hostile files, about 3 minutes"
	@echo "make compat    run the fast tests with other versions of Python and PyTorch"
	@echo "make lint      check the style and the spelling"
	@echo "make docs      build the documentation site in site/ and check its links"
	@echo "make install   install everything and stop there"
	@echo "make clean     remove .venv, site and what the demos wrote"

demo:
	$(PYTHON) requirements/install.py demo
	$(PY) tools/train.py $(DIGITS_CONFIG) --work-dir $(DIGITS)
	$(PY) tools/test.py $(DIGITS_CONFIG) $(DIGITS)/epoch_30.pth \
	    --work-dir $(DIGITS) --out $(DIGITS)/test.pkl
	$(PY) tools/analysis_tools/report_classification.py $(DIGITS_CONFIG) \
	    $(DIGITS)/epoch_30.pth $(DIGITS) $(DIGITS)/test.pkl

# The backbones of the other two demos are initialized from this checkpoint.
$(DIGITS)/epoch_30.pth:
	$(PY) tools/train.py $(DIGITS_CONFIG) --work-dir $(DIGITS)

# Install first: training the checkpoint requires the environment.
demo-seg: install
	$(MAKE) $(DIGITS)/epoch_30.pth
	$(PY) tools/train.py $(SCENES_CONFIG) --work-dir $(SCENES)
	$(PY) tools/test.py $(SCENES_CONFIG) $(SCENES)/iter_2400.pth \
	    --work-dir $(SCENES) --out $(SCENES)/test.pkl
	$(PY) tools/analysis_tools/report_segmentation.py $(SCENES_CONFIG) \
	    $(SCENES)/test.pkl $(SCENES)/predictions.png

demo-det: install
	$(MAKE) $(DIGITS)/epoch_30.pth
	$(PY) tools/train.py $(BOXES_CONFIG) --work-dir $(BOXES)
	$(PY) tools/test.py $(BOXES_CONFIG) $(BOXES)/iter_1400.pth \
	    --work-dir $(BOXES) --out $(BOXES)/test.pkl
	$(PY) tools/analysis_tools/report_detection.py $(BOXES_CONFIG) \
	    $(BOXES)/test.pkl $(BOXES)/predictions.png --score-thr 0.5

install:
	$(PYTHON) requirements/install.py full

# One process per core with one thread each. The tests of a file run in the same
# process because they share fixtures. If a process dies, the run ends at once and
# names its test; pytest-xdist would otherwise wait for ever.
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile \
	    --no-loadscope-reorder --max-worker-restart 0

# The tests marked fast, see tests/conftest.py: under 90 seconds on 2 cores.
test-fast: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile \
	    --max-worker-restart 0 -m fast

# Kills training 20 times in epoch-based and in iteration-based runs.
test-kill: install
	MMVVT_KILLS=20 OMP_NUM_THREADS=1 $(PY) -m pytest -s -q \
	    tests/test_tools/test_kill_and_resume.py

# Prints a table of the outcomes. A case that fails can be repeated alone.
fuzz: install
	$(PY) tests/fuzz.py --cases 10000

# Other versions of Python, PyTorch and OpenMMLab, see noxfile.py. Each of the
# environments takes up to 6 GB of disk space.
compat:
	$(PYTHON) -m venv .nox
	.nox/bin/python -m pip install --quiet nox==2025.11.12
	.nox/bin/nox

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib .
	$(PY) -m mypy

# Warnings are errors. EXTERNAL=1 also fetches the links to other servers.
docs:
	$(PYTHON) requirements/install.py docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) docs/check_links.py site $(if $(EXTERNAL),--external)
	@echo "open site/index.html, or for the search: $(PY) -m http.server -d site"

clean:
	rm -rf .venv site data/digits data/digit-scenes $(DIGITS) $(SCENES) $(BOXES)
