PYTHON ?= python3
RUN := .venv/bin/python
# Byte code is kept in one place whatever the shell says: without it vLLM takes twice as long to start.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/pycache
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Threads that wait give their core to others: on a busy machine spinning ones make tests and training many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test test-unit test-long lint bench report soak sbom audit eval-env clients-env wheels tag smoke

setup:      ; @$(PYTHON) tools/setup.py
demo: setup ; @$(RUN) -m dftserve.cli demo
# Two processes: one for the tests that share engines, which mostly wait, one for the others. Of one thread each.
test test-unit: export OMP_NUM_THREADS ?= 1
test: setup ; @$(RUN) -m pytest -m "not long" --numprocesses 2 --dist loadscope --no-loadscope-reorder
test-unit: setup ; @$(RUN) -m pytest -m "not long" --numprocesses 2 --dist loadscope --no-loadscope-reorder tests/unit
test-long: setup ; @$(RUN) -m pytest -m long
eval-env: setup ; @$(PYTHON) tools/eval_env.py
clients-env: setup ; @$(PYTHON) tools/clients_env.py
lint: setup ; @ruff check . && ruff format --check . && pyright && lint-imports
# Both fetch their tool into an environment of its own. `audit` asks a service for known weaknesses, which a
# machine that reaches package indexes only does not reach: so it is not part of `lint`.
sbom: setup  ; @$(PYTHON) tools/supply_chain.py sbom
audit:       ; @$(PYTHON) tools/supply_chain.py audit
# What a release is: both wheels in dist/, and that they serve from an environment of their own.
wheels:      ; @$(PYTHON) tools/release.py wheels
# Whether $GITHUB_REF_NAME is the wheels' version; not as a variable of make, which would expand what is in it.
tag:         ; @$(PYTHON) tools/release.py tag
smoke:       ; @$(PYTHON) tools/release.py smoke
bench: setup
	@for question in overhead served sampler first_law known_source train_cost families groups; do $(RUN) bench/$$question.py || exit 1; done
	@$(RUN) bench/report.py
# The tables of README.md and docs/ from bench/results.
report: setup ; @$(RUN) bench/report.py
# Promises over many requests, on this machine's CPU: SCALE=0.01 for a hundredth of them.
SCALE ?= 1
soak: setup ; @$(RUN) bench/soak.py --scale $(SCALE)
