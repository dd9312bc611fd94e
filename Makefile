# make run    build the environment, run the whole graph on the demo cohort
# make test   build the environment, run the tests (SLOW=1 adds the slow ones, IMAGES=folder those
#             on real images, ARGS="tests/test_sheet.py -k name" chooses)
# make test-slurm  the workflow on a Slurm of one node, whose Debian packages are downloaded (FULL=1:
#             all faults, and the demo's own sheet)
# make test-faults  inject faults into the workflow and its files, print a table (FULL=1: all moments)
# make fuzz   mutated files for every reader (FULL=1: 10^5 of each text format, 10^4 of the others)
# make check  formatting, lint, types, layers of the package; changes nothing
# make fix    format and apply automatic fixes
# make bench  the benchmarks, one after the other, over an hour; writes benchmarks/RESULTS.md
#             (ONLY="reading plan" chooses, IMAGES=folder adds those that take hours)
# make docs   the documentation as a site in build/docs; broken links are errors
# make lock   choose versions anew and write requirements.lock

PYTHON ?= python3.11
CORES ?= all
WORKERS ?= 2
SLOW ?=
FULL ?=
IMAGES ?=
ONLY ?=

.PHONY: run test test-slurm test-faults fuzz check fix bench docs lock
.DELETE_ON_ERROR:

# The packages of the lock are installed without resolving: two engines pin old versions that are
# overridden there. uv, itself in the lock, does the rest in seconds. Modules are compiled at once:
# where PYTHONDONTWRITEBYTECODE is set, each job would compile them again, for seconds.
.venv/installed: requirements.lock pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^    --hash/p}' requirements.lock > .venv/uv.lock.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r .venv/uv.lock.txt
	VIRTUAL_ENV=$(CURDIR)/.venv .venv/bin/uv pip install --quiet --system-certs --no-deps --require-hashes --compile-bytecode -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

run: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" snakemake --cores $(CORES)

test: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 FULL=$(FULL) pytest --numprocesses $(WORKERS) --dist loadfile \
		-m "not slurm$(if $(SLOW),, and not slow)" $(or $(ARGS),tests) $(if $(IMAGES),--images=$(abspath $(IMAGES)))

test-slurm: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 FULL=$(FULL) pytest -m slurm tests/test_slurm.py

test-faults: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 FULL=$(FULL) pytest --numprocesses $(WORKERS) --dist loadfile \
		-m fault tests

fuzz: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 FULL=$(or $(FULL),0.02) pytest --numprocesses $(WORKERS) tests/test_fuzz.py

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/.venv/bin:$$PATH" snakemake --lint

fix: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/snakefmt Snakefile workflow

bench: .venv/installed
	.venv/bin/python benchmarks/_run.py $(ONLY) $(if $(IMAGES),--images $(abspath $(IMAGES)))

docs: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

lock: .venv/installed
	.venv/bin/uv pip compile --system-certs pyproject.toml --all-extras --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade --quiet -o requirements.lock
	sed -i "s/^LOCK_SHA256=.*/LOCK_SHA256=$$(sha256sum requirements.lock | cut -d' ' -f1)/" envs/hemera.post-deploy.sh
