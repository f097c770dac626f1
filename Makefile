# Everything runs in .venv, which is made from $(PYTHON) when it is missing or pyproject.toml has changed.
PYTHON ?= python3
DEMO ?= celery
DEMO_ARGS ?=
TEST_ARGS ?=
SCHEDULES ?= 1000000
# Three test processes for two processors: tests wait more than they compute.
PROCESSES ?= 3
RUN = .venv/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check --editable

.PHONY: demo test soak bench lint docs clean

demo: .venv/.ready
	$(RUN) examples/$(DEMO)_demo.py $(DEMO_ARGS)

test: .venv/.ready-dev
	$(RUN) -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder -m 'not soak' $(TEST_ARGS)

soak: .venv/.ready-dev
	$(RUN) -m pytest -n 2 --dist loadfile -m soak
	$(RUN) -m tests.sim --schedules $(SCHEDULES)

bench: .venv/.ready-dev
	$(RUN) -m bench

lint: .venv/.ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/.ready-dev
	$(RUN) -m pytest -n 2 tests/docs

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'JobSync needs Python 3.10 or newer. Name one that you have: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
		{ echo 'This Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PIP) '.[cli,metrics,embedded,celery,dramatiq]' 'celery[redis]>=5.4' 'dramatiq[redis]>=1.17'
	@touch $@

.venv/.ready-dev: .venv/.ready
	$(PIP) '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
