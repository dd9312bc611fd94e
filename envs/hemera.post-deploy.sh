#!/usr/bin/env bash
# Fills the conda environment from the hash-locked requirements.lock of the working directory.
#
# Snakemake copies this script beside the environment and makes a new environment when its text
# changes; the lock's SHA-256 stands here so that a changed lock is a changed environment.
# `make lock` keeps it equal, and a test holds it.
set -euo pipefail

LOCK_SHA256=0d9b51b9ea7d469463f5cf2a289ea725a0d1c59470038df57b9f671dc1ba2dec

if [ ! -f requirements.lock ]; then
    echo "requirements.lock: not in $PWD; run snakemake from HEMERA's own folder" >&2
    exit 1
fi
if [ "$(sha256sum requirements.lock | cut -d' ' -f1)" != "$LOCK_SHA256" ]; then
    echo "requirements.lock: not the one this environment is for; take both from the same version of HEMERA" >&2
    exit 1
fi
python -m pip install --no-deps --require-hashes -r requirements.lock
python -m pip install --no-deps --no-build-isolation -e .
