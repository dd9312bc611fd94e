"""Snakemake's plugin for Kubernetes with volumes that all pods mount.

Version 0.5, as observed: it assumes that pods share no file system, whatever `shared-fs-usage`
names, uploads the sources and demands a default storage provider.
"""

import dataclasses
import shlex
from typing import Any


def share_volumes(plugin: Any) -> None:
    """Let `shared-fs-usage` apply, and let each pod begin in the working directory."""
    plugin.common_settings = dataclasses.replace(
        plugin.common_settings,
        implies_no_shared_fs=False,
        job_deploy_sources=False,
        auto_deploy_default_storage_provider=False,
    )
    plugin.executor.get_job_exec_prefix = _prefix


def _prefix(executor: Any, job: Any) -> str:
    """Return the command before that of a job."""
    return f"cd {shlex.quote(str(executor.workflow.workdir_init))}"
