# Two commands matter: `make demo` and `make test`. Each sets up all it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint quick harness llama-cpp fuzz clean

demo: setup
	$(BIN)/qvgpt demo

test: setup lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadgroup  # tests use one thread each

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which with PYTHON=…"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { echo "no venv module: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

quick: setup  # every reproduction and benchmark in its reduced form
	$(BIN)/python reproductions/random_walk/run.py --quick
	$(BIN)/python reproductions/search/run.py --quick
	$(BIN)/python reproductions/games/run.py --quick
	$(BIN)/python reproductions/translation/run.py --quick
	$(BIN)/python reproductions/summarization/run.py --quick
	$(BIN)/python reproductions/qa/run.py --quick
	$(BIN)/python reproductions/sentiment/run.py --quick
	$(BIN)/python reproductions/export/run.py --quick
	$(BIN)/python reproductions/dialogue/run.py --quick
	$(BIN)/python benchmarks/train.py --quick
	$(BIN)/python benchmarks/gpu.py --quick
	$(BIN)/python benchmarks/serve.py --quick

harness: setup  # lm-evaluation-harness on a guided model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[harness]'
	$(BIN)/pytest -m harness tests/test_harness.py

fuzz: setup  # the server under more than five hundred requests made up from its schema
	QVGPT_FUZZ=120 $(BIN)/pytest -s tests/serve/test_schema.py

llama-cpp: setup  # llama.cpp, built from source (minutes), on exported models
	$(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python
	$(BIN)/pytest -m llama_cpp tests/export

clean:
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache .hypothesis
