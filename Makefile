# Every target makes what it needs. `make serve` and `make test` work on a bare machine with Python 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data/cifar10_jpeg.npz
RUN ?= runs/default

.PHONY: serve test test-slow check train bundle bench rules clean

serve: $(VENV)/serve.stamp
	$(BIN)/vitserve serve

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q

# Full-size checkpoints, a million simulated images: half an hour.
test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train: $(VENV)/dev.stamp
	$(BIN)/vitserve train $(DATA) --output $(RUN)

bundle: $(VENV)/dev.stamp
	$(BIN)/vitserve export checkpoints/default/weights.safetensors --output service/default_bundle --name compact-hybrid-cifar10 \
		--images $(DATA) --judged-images 10000 --precision bf16

bench: $(VENV)/dev.stamp
	$(BIN)/vitserve bench $(BENCH_ARGS)

# The Prometheus operator's form of the same rules.
rules:
	{ printf '# Written by `make rules` from docker/prometheus/rules.yml, which is the one to edit.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n'; \
	printf 'metadata:\n  name: vitserve\n  labels:\n    app.kubernetes.io/name: vitserve\nspec:\n'; \
	sed -n '/^groups:/,$$p' docker/prometheus/rules.yml | sed 's/^\(.\)/  \1/'; } > k8s/components/monitoring/rules.yaml

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

# torch before the rest: its CPU build is chosen by exact version, and what follows finds it installed.
# timm and torchvision without what they ask for: they would replace torch by another build. The tests compare with them.
$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps timm torchvision
	touch $@ $(VENV)/serve.stamp
