"""The profile kubernetes, with a stand-in for the cluster: its pods are processes elsewhere.

Skipped without snakemake-executor-plugin-kubernetes, on which HEMERA does not depend.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_workflow import TINY, lay_out, snakemake

pytest.importorskip(
    "snakemake_executor_plugin_kubernetes",
    reason="install snakemake-executor-plugin-kubernetes",
)
pytestmark = pytest.mark.slow

PROFILE = ("--profile", "profiles/kubernetes")

STAND_IN = """
import subprocess, sys, tempfile, types
import kubernetes
from snakemake.cli import main

class Cluster:
    codes = {}
    def create_namespaced_job(self, namespace, body):
        container = body.spec.template.spec.containers[0]
        print("pod of", container.image, container.resources.requests, flush=True)
        pod = subprocess.run(["/bin/sh", *container.args], cwd=tempfile.mkdtemp())
        self.codes[body.metadata.name] = pod.returncode
        return body
    def read_namespaced_job_status(self, name, namespace):
        code = self.codes[name]
        status = types.SimpleNamespace(failed=int(code != 0), succeeded=int(code == 0))
        return types.SimpleNamespace(status=status)
    def __getattr__(self, name):
        return lambda *words, **named: types.SimpleNamespace(items=[])

kubernetes.config.load_kube_config = lambda: None
kubernetes.client.BatchV1Api = kubernetes.client.CoreV1Api = Cluster
main(sys.argv[1:])
"""


@pytest.fixture
def small(cohort: Path, tmp_path: Path) -> Path:
    """A working directory with the small cohort."""
    lay_out(tmp_path, TINY)
    for path in cohort.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_a_dry_run_plans_every_stage(small: Path) -> None:
    text = snakemake(small, *PROFILE, "-n", "data")
    for stage in ("describe", "register", "tile", "mask", "filter", "index", "report"):
        assert f"\nrule {stage}:" in text
    assert "gpu_manufacturer=nvidia" in text and "disk_mb=1000" in text


def test_a_storage_plugin_is_refused(small: Path) -> None:
    words = ("--default-storage-provider", "fs", "--default-storage-prefix", "store")
    pytest.importorskip("snakemake_storage_plugin_fs", reason="install snakemake-storage-plugin-fs")
    text = snakemake(small, *PROFILE, *words, "-n", "data", check=False)
    assert "mount the images on all nodes" in text and "Traceback" not in text


def test_pods_begin_in_the_working_directory(small: Path) -> None:
    target = "results/tile/bci.000.tar"
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, *PROFILE, "--retries=0", target],
        cwd=small,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert (small / target).exists()
    assert done.stdout.count("pod of registry.example.org/hemera:latest") == 2
    assert "'memory': '3000M', 'ephemeral-storage': '1000M'" in done.stdout
