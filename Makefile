# Each target sets up what it needs in .venv: Python 3.11 or newer and pip are enough.
PYTHON ?= python3
BIN = .venv/bin

train: .venv/ready            ## the main job on the embedded default; pass more as ARGS="algo.name=gspo run.dir=runs/gspo"
	$(BIN)/torchrun --standalone train.py config.yaml $(ARGS)

test: .venv/ready             ## the fast tests, what has to pass before anything lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-slow: .venv/ready        ## everything
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow"

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, found {sys.version.split()[0]}'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch .venv/ready

.PHONY: train test test-slow
