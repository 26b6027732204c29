# make demo    a real model becomes a small one, in minutes          make bench   the claims, measured; writes docs/evidence
# make test    the whole test suite                                  make check   format, lint, types, imports, tests
# make fix     format and mend what can be mended                    make docs    the generated reference pages
# make toolchains   vendor compilers and simulators, each in an environment of its own: their tests run instead of being skipped
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := train,tensorrt-rtx,openvino,litert,dev

.PHONY: demo test check fix docs bench lint toolchains clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

# one thread: networks this small only lose by sharing a step between two
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/compress-for-device run recipes/digits.toml --model examples.digits.model:teacher --data examples.digits:load

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not outcome" -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python -m tools.generate_docs

# what cannot be installed (no network, no npm) is said, and its tests are skipped with the reason
toolchains: $(STAMP)
	for name in ethos-u tflite-micro web qnn coreml executorch rknn; do \
		$(BIN)/compress-for-device toolchain install $$name >/dev/null || echo "tool chain $$name is not here: its tests are skipped"; \
	done

bench: $(STAMP)
	$(BIN)/python -m tools.bench

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
