# Every target makes the environment first where it is missing. PYTHON chooses the interpreter, OUT the demo's folder.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help demo dev test check format lint types wheel nightly pocket table clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first: alone, pip takes the build that the constraints name and nothing else can pull another one in.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing rewardtune into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what tests and checks need"
	@$(PIP) setuptools -e '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## train pocket/zreward, compare with its start, show where the report is
	$(BIN)/rewardtune train pocket/zreward --out $(OUT)
	$(BIN)/rewardtune compare base $(OUT) --out $(OUT)/compare

dev: $(VENV)/installed-dev  ## the environment with what tests and checks need
	$(BIN)/pre-commit install 2>/dev/null || true

test: $(VENV)/installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -m 'not gpu and not nightly' -n logical --dist loadfile

check: format lint types test  ## what CI runs

format: $(VENV)/installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

# A checkout keeps rewards/, pipelines/ and recipes/ beside rewardtune/; installed, they lie inside it. Type checkers
# cannot follow that mapping, so they get a folder of links that looks installed.
types: $(VENV)/installed-dev
	rm -rf build/types
	mkdir -p build/types/rewardtune
	ln -s $(CURDIR)/rewardtune/* $(CURDIR)/rewards $(CURDIR)/pipelines $(CURDIR)/recipes build/types/rewardtune/
	MYPYPATH=build/types $(BIN)/mypy -p rewardtune

wheel: $(VENV)/installed-dev  ## dist/*.whl
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

nightly: $(VENV)/installed-dev  ## the long tests too
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[nightly]'
	$(BIN)/python -m pytest -m 'not gpu' --timeout 7200

pocket: $(VENV)/installed-dev  ## rebuild the pocket world and its weights from nothing (hours)
	$(BIN)/python dev/pocket/build_all.py

table: $(VENV)/installed-dev  ## the Z-Reward table on the pocket world: goes on where it was stopped (hours)
	@$(PIP) -e '.[table]'
	$(BIN)/python dev/pocket/zreward_table.py run

clean:  ## what builds leave behind; runs/ stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
