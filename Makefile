PYTHON ?= python3
BIN := .venv/bin
RUN := build/demo

.PHONY: demo test test-long test-hosts test-slurm install horovod lint format bench fuzz fuzz-server soak faults wheel clean

demo: .venv/ready  ## train the MNIST recipe on the built-in sample, evaluate it, predict a picture
	rm -rf $(RUN) && $(BIN)/hpcai preprocess mnist --source sample --output build/sample.h5 --force
	$(BIN)/hpcai train mnist --data build/sample.h5 --epochs 12 --output $(RUN)
	$(BIN)/hpcai evaluate $(RUN) --require "accuracy>=0.95"
	$(BIN)/hpcai predict $(RUN) tests/digit.png

test: .venv/test horovod  ## run all tests; Horovod is built first, once
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 20 -m "not alone and not long and not cluster"
	$(BIN)/python -m pytest -m "alone and not long"

test-long: .venv/test horovod  ## the tests that train or start ranks again and again
	$(BIN)/python -m pytest -m long

test-hosts: .venv/test horovod  ## training over two hosts, network namespaces of this machine: needs root, and gets ssh
	{ command -v sshd && command -v ip; } > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2; }
	$(BIN)/python -m pytest tests/two_hosts

test-slurm: .venv/test horovod  ## jobs of a real Slurm of one node, some of which wait for their limit: needs root, and gets Slurm
	{ command -v slurmctld && command -v munged; } > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m pytest tests/slurm

install: .venv/ready  ## a virtual environment in .venv with hpcai in it, editable

horovod: .venv/ready  ## build Horovod for the installed TensorFlow, or find it in the cache
	@$(BIN)/python -m hpcai_cli.engine.environment.horovod_build

lint: .venv/test  ## the linter, import rules included
	$(BIN)/ruff check .

format: .venv/test  ## sort imports and mend what the linter can mend
	$(BIN)/ruff check --fix .

bench: .venv/test horovod  ## measure the speed claims of the README, into benchmarks/ and its table of figures
	test -e data/mnist.h5 || $(BIN)/hpcai preprocess mnist
	$(BIN)/hpcai benchmark all --output benchmarks/bench-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/hpcai benchmark report "$$(ls -d benchmarks/bench-* | tail -1)" --readme README.md

fuzz: .venv/test  ## 10,000 mutated files of each format through its reader
	$(BIN)/python tests/fuzz.py

fuzz-server: .venv/test  ## 10,000 wrong requests to a running server; SCHEMATHESIS=PATH has that program ask it too
	$(BIN)/python tests/fuzz_server.py $(if $(SCHEMATHESIS),--schemathesis $(SCHEMATHESIS))

soak: .venv/test  ## 20 minutes of load on the server, with reloads, too much of it, a killed worker and the end
	$(BIN)/python tests/soak.py

faults: .venv/test horovod  ## trainings that are killed, stopped and disturbed: nothing may be lost; FAULTS="--seed 1 --only kills-1"
	$(BIN)/python tests/faults.py $(FAULTS)

wheel: .venv/test  ## build the wheel, install it in an empty environment elsewhere, and run it
	$(BIN)/python -m pytest tests/wheel_check.py

clean:  ## remove everything that make made, but not runs and data
	rm -rf .venv build dist *.egg-info

.venv/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "hpcai needs Python 3.10 to 3.13 and this is %d.%d; install one and run: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv > /dev/null || { rm -rf .venv; echo "cannot make a virtual environment; install venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing TensorFlow and the rest into .venv" >&2 && $(BIN)/pip install -q -e '.[horovod]' && touch $@

.venv/test: .venv/ready
	@$(BIN)/pip install -q -e '.[test,horovod,onnx,serve,tune]' && touch $@
