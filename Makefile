# Every verb is one line; `make` lists them. PYTHON picks the interpreter for a new .venv.
PYTHON ?= python3
BIN := .venv/bin
# Compiled modules are kept, whatever the shell says: each process of the tests would compile them again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test check docs bench format release
help:    ; @echo "make demo | test | check | docs | bench | format | release"
demo:    .venv/demo.stamp ; $(BIN)/python examples/demo.py
test:    .venv/dev.stamp  ; $(BIN)/pytest -q -n auto --dist worksteal --ignore tests/compiled && JAXTYPING_DISABLE=1 $(BIN)/pytest -q -n auto --dist worksteal tests/compiled -p no:jaxtyping --override-ini=addopts=-ra
check:   .venv/dev.stamp  ; $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports
docs:    .venv/dev.stamp  ; NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
bench:   .venv/dev.stamp  ; $(BIN)/python benchmarks/micro/run.py
release: .venv/dev.stamp  ; rm -rf dist && $(BIN)/python -m build -q && $(BIN)/twine check --strict dist/*.whl dist/*.tar.gz && $(BIN)/pip install -q --no-deps --target dist/installed dist/*.whl && cd dist && PYTHONPATH=installed ../$(BIN)/python ../tests/installed.py
format:  .venv/dev.stamp  ; $(BIN)/ruff format . && $(BIN)/ruff check --fix .

.venv/bin/python:               ; $(PYTHON) -m venv .venv
.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt ; $(BIN)/pip install -q -c constraints.txt -e '.[demo]' && touch $@
.venv/dev.stamp:  .venv/bin/python pyproject.toml constraints.txt ; $(BIN)/pip install -q -c constraints.txt -e '.[dev]' && touch $@ .venv/demo.stamp
