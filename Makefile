# make demo | make test | make proofs | make fidelity | make bench | make gpu | make pods | make torture
# | make imagenet TARS=folder | make clean
PYTHON ?= python3
# cuda12 where an NVIDIA driver answers, else cpu; `make demo ACCELERATOR=tpu` on a TPU.
ACCELERATOR ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda12 || echo cpu)
VENV ?= .venv
DATA ?= data/imagenet
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test proofs fidelity bench gpu pods torture imagenet clean

demo: $(VENV)/installed-$(ACCELERATOR)
	$(BIN)/python main.py

test: $(VENV)/installed-$(ACCELERATOR)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The short forms of `make fidelity` and `make torture`.
proofs: $(VENV)/installed-$(ACCELERATOR)-test
	$(BIN)/python -m pytest proofs

# Measure every claim of docs/fidelity.md anew. PHOTOS: a folder of JPEG files. WEIGHTS: a folder of resnet18*
# and resnet34* (.pth or .safetensors). Without them: pieces of scikit-learn's two photographs, random weights.
# PARTS: some of trajectories, segmentation,
# segmentation_steps, pytorch, devices, ddp, collectives, pixels, weights, convnext, counts, vision_transformers, rivals.
fidelity: $(VENV)/installed-$(ACCELERATOR)-test
	$(BIN)/python -m proofs.fidelity $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(PARTS)

# Ours and its rivals in turns; a table each, and the rows in runs/bench/. PHOTOS: a folder of JPEG files.
bench: $(VENV)/installed-$(ACCELERATOR)-bench
	mkdir -p runs/bench
	$(BIN)/python -m proofs.bench.step --json runs/bench/step.json
	$(BIN)/python -m proofs.bench.loss --json runs/bench/loss.json
	$(BIN)/python -m proofs.bench.input $(if $(PHOTOS),--photos $(PHOTOS)) --json runs/bench/input.json
	$(BIN)/python -m proofs.bench.loop --json runs/bench/loop.json
	$(BIN)/python -m proofs.bench.start --json runs/bench/start.json
	$(BIN)/python -m proofs.bench.growth --json runs/bench/growth.json --plot docs/growth.png
	$(BIN)/python -m proofs.bench.evaluation --json runs/bench/evaluation.json
	$(BIN)/python -m proofs.bench.convolutions --json runs/bench/convolutions.json
	$(BIN)/python -m proofs.bench.networks --json runs/bench/networks.json

# What a machine with an NVIDIA GPU shows, in twenty minutes, into docs/gpu.md. PARTS: some of tests, fidelity, step,
# cifar, together, loss, loop, kill.
gpu: $(VENV)/installed-$(ACCELERATOR)-test
	$(BIN)/python -m proofs.gpu $(if $(PHOTOS),--photos $(PHOTOS)) $(PARTS)

# What pods of TPUs would take, by their compiler, into docs/pods.md; no TPU is needed. PARTS: some of v5e:2x4,
# v5e:8x8, v6e:8x8, effort.
pods: $(VENV)/installed-$(ACCELERATOR)-test
	$(PIP) "jax[tpu]"
	$(BIN)/python -m proofs.pods $(PARTS)

# Kill, fill the disk, hand over hostile files …, and say what survives, two and a half hours long. PARTS: some of
# kill, preemption, elastic, processes, hosts, pod, intervals, disk, buckets, strangers, endurance.
torture: $(VENV)/installed-$(ACCELERATOR)-test
	$(BIN)/python -m proofs.torture $(if $(PHOTOS),--photos $(PHOTOS)) $(PARTS)

# Pack ImageNet once as tfds reads it: TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
imagenet: $(VENV)/installed-$(ACCELERATOR)-prepare
	@test -n "$(TARS)" || { echo "usage: make imagenet TARS=folder-of-the-two-tars [DATA=$(DATA)]"; exit 1; }
	$(BIN)/python -m tat_jax.data.prepare --tars $(TARS) --to $(DATA)

$(VENV)/installed-$(ACCELERATOR): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing JAX for $(ACCELERATOR) and the rest into $(VENV); this takes a few minutes"
	$(PIP) -e ".[$(ACCELERATOR)]"
	touch $@

$(VENV)/installed-$(ACCELERATOR)-%: $(VENV)/installed-$(ACCELERATOR)
	$(PIP) -e ".[$(ACCELERATOR),$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
