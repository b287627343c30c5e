PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-full bench lint format programs clean

demo: $(STAMP)
	$(BIN)/prefloop demo $(ARGS)

test: $(STAMP) programs
	$(BIN)/pytest -m "not full" $(ARGS)

test-full: $(STAMP) programs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev,track,cluster-test]"
	$(BIN)/pytest --reliability=RELIABILITY.md $(ARGS)

# ARGS="--data PAIRS" at least
bench: $(STAMP)
	$(BIN)/prefloop bench train $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tests run Debian's Chromium, PostgreSQL and ip; without root they must be there already.
programs:
	@{ command -v chromium && ls /usr/lib/postgresql/*/bin/postgres && command -v ip; } >/dev/null 2>&1 \
		|| { test "$$(id -u)" = 0 && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium postgresql iproute2 >/dev/null; } \
		|| echo "tests will be skipped: install Debian's packages chromium, postgresql and iproute2 to run them all"

# torch first: with it in place no other package pulls another build of it. Debian's python3 makes no environment with
# pip unless python3-venv is there too; its pip can put itself into one.
$(STAMP): requirements.lock pyproject.toml
	@echo "installing the locked packages into $(VENV); about two minutes"
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf .prefloop .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
