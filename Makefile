# Each target sets up what it needs in .venv: Python 3.11 or newer and pip are enough.
PYTHON ?= python3
BIN = .venv/bin
# "make train algo.name=gspo" sets a variable of make, which would train the default all the same.
SETTINGS = $(foreach name,$(.VARIABLES),$(if $(findstring .,$(name)),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(strip $(SETTINGS)),)
$(error found the settings $(strip $(SETTINGS)) of train.py; expected them in ARGS="section.key=value …")
endif

train: .venv/ready            ## the main job on the embedded default; pass more as ARGS="algo.name=gspo run.dir=runs/gspo"
	$(BIN)/python train.py config.yaml $(ARGS)

test: .venv/ready             ## the fast tests, what has to pass before anything lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-core: .venv/ready        ## the fast tests of what trains, for forks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --ignore=tests/tools

test-slow: .venv/ready        ## everything
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "slow or not slow"

lint: .venv/ready             ## format and a small set of checks; "make format" mends what can be mended
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, found {sys.version.split()[0]}'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch .venv/ready

.PHONY: train test test-core test-slow lint format
