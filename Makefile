# make eval and make test set everything up in .venv first, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Detectron2 0.6's Python part; its archive lacks the C++ files, so the extension is left out. pip 26 refuses it.
DETECTRON2 := --use-pep517 --no-build-isolation --no-deps \
	--config-settings=--global-option=build_py --config-settings=--build-option=--skip-build pb1-detectron2==0.6

.PHONY: eval test lint gpu clean

eval: $(READY) ## Compare the demo model with itself on fewer tokens.
	$(BIN)/python train_net.py --eval-only

test: $(READY) ## Run the tests, one process a core: their tensors are too small for threads.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations 25

lint: $(READY) ## Check the code's style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A $(PYTHON) that has everything is used as it is: a CUDA machine without a network needs nothing more.
gpu: ## On a CUDA machine: run the tests on the device and time the encoders. Results lie in output/gpu.
	@if $(PYTHON) -c "import hourglass, hourglass.config, pycocotools, pytest, tabulate, tqdm" 2>/dev/null; then \
		$(PYTHON) -m benchmarks.gpu; \
	else \
		$(MAKE) $(READY) && $(BIN)/python -m benchmarks.gpu; \
	fi

clean: ## Remove the environment and what was made.
	rm -rf $(VENV) build output *.egg-info

# A Detectron2 that $(PYTHON) already has is seen through --system-site-packages and kept, with its torch.
$(READY): setup.cfg pyproject.toml Makefile
	test -x $(BIN)/python || { \
		if $(PYTHON) -c "import detectron2" 2>/dev/null; then site=--system-site-packages; fi; \
		$(PYTHON) -m venv --without-pip $$site $(VENV); }
	$(BIN)/python -m ensurepip --default-pip >/dev/null 2>&1 || $(BIN)/python tools/get_pip.py
	$(BIN)/python -m pip install --quiet "pip<26"
	$(BIN)/python -c "import detectron2" 2>/dev/null || { \
		$(BIN)/python -m pip install "setuptools<81" wheel torch torchvision && \
		$(BIN)/python -m pip install $(DETECTRON2); }
	$(BIN)/python -m pip install --editable ".[detectron2,tests]"
	touch $(READY)
