"""Dry runs of the workflow through Snakemake's API. Nothing is run or written."""

import contextlib
import csv
import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from snakemake.api import DAGApi, SnakemakeApi
from snakemake.exceptions import MissingRuleException, RuleException
from snakemake.logging import logger
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    OutputSettings,
    Quietness,
    ResourceSettings,
)
from snakemake.utils import update_config
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_logger_plugins.common import LogEvent

from hemera.config import STAGES, Config, load, read_yaml
from hemera.config.base import nearest
from hemera.errors import ConfigError
from hemera.files import layout

STAGE_ORDER = ("demo", *(name for stage in STAGES for name in (stage, f"{stage}_cohort")))
"""Rules in the order of the graph."""

TARGETS = ("all", "data", "status")
ONCE = ("filter", "index", "report", "train_segmentation", "evaluate", "cases", "evaluate_status")
"""Targets of Snakemake that are no files: those of the Snakefile, and stages of one job."""

FIRST_CONFIG = Path("config.yaml")
"""The Snakefile reads it before the file of `--configfile`, whose keys replace its own."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that would run."""

    rule: str
    unit: str
    """Name of a pair, a block or a preset, a slash between two; empty for a job of the cohort."""
    outputs: tuple[str, ...]
    benchmark: str | None
    reason: str
    """In Snakemake's words, see `hemera.graph.reasons`."""
    threads: int
    memory_mb: int | None
    """None: known only when an earlier job has run."""


@dataclasses.dataclass(frozen=True)
class Output:
    """A file of the graph; `is_pending`: a run would make it."""

    path: str
    rule: str
    unit: str
    is_pending: bool


class _Records(logging.Handler):
    """The jobs that a dry run lists, from its log events."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.jobs: list[Job] = []

    def emit(self, record: logging.LogRecord) -> None:
        found: Any = record
        # A job without output is a target.
        if getattr(record, "event", None) != LogEvent.JOB_INFO or not found.output:
            return
        memory_mb = found.resources.get("mem_mb")
        self.jobs.append(
            Job(
                rule=found.rule_name,
                # The prefix of mask is empty for real HER2.
                unit="/".join(filter(None, dict(found.wildcards or {}).values())),
                outputs=tuple(found.output),
                benchmark=found.benchmark,
                reason=found.reason,
                threads=found.threads,
                memory_mb=memory_mb if isinstance(memory_mb, int) else None,
            )
        )


def planned_jobs(
    snakefile: Path, configfile: Path, targets: Sequence[str] = (), cores: int = 1
) -> list[Job]:
    """Return the jobs that ``snakemake --configfile CONFIGFILE TARGETS`` would run here.

    A job has at most `cores` threads.

    Raises:
        ConfigError: in Snakemake's words, where the workflow cannot begin.
    """
    with _graph(snakefile, configfile, targets, cores) as (graph, records):
        graph.execute_workflow(executor="dryrun")
    return records.jobs


def outputs(snakefile: Path, configfile: Path, targets: Sequence[str] = ()) -> list[Output]:
    """Return all files of the graph of `targets`; as `planned_jobs`."""
    text = io.StringIO()
    with _graph(snakefile, configfile, targets) as (graph, _), contextlib.redirect_stdout(text):
        graph.summary()
    text.seek(0)
    return [
        Output(
            row["output_file"],
            row["rule"],
            layout.unit(row["output_file"]),
            row["plan"] != "no update",
        )
        for row in csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    ]


def effective_config(configfile: Path) -> Config:
    """Return the configuration as the workflow reads it with ``--configfile CONFIGFILE``."""
    values: dict[str, Any] = {}
    first = [FIRST_CONFIG] if FIRST_CONFIG.exists() else []
    for path in dict.fromkeys([*first, configfile]):
        update_config(values, dict(read_yaml(path)))
    return load(values, source=str(configfile))


def _is_unknown(target: str, error: Exception) -> bool:
    """Return whether Snakemake has no rule for a target, or one of several jobs."""
    if isinstance(error, MissingRuleException):
        return f"No rule to produce {target} " in str(error)
    return "Target rules may not contain wildcards" in str(error) and target in STAGES


@contextlib.contextmanager
def _graph(
    snakefile: Path, configfile: Path, targets: Sequence[str], cores: int = 1
) -> Iterator[tuple[DAGApi, _Records]]:
    read_yaml(configfile)
    records = _Records()
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL}, dryrun=True)) as api:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(records)
        logger.propagate = False
        try:
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=cores),
                config_settings=ConfigSettings(
                    config={"only_planned": True}, configfiles=[configfile.absolute()]
                ),
                snakefile=snakefile,
            )
            yield (
                workflow.dag(DAGSettings(targets=frozenset(targets), force_incomplete=True)),
                records,
            )
        except SystemExit as error:  # from the rules, with a message
            raise ConfigError(str(error).strip()) from error
        except (WorkflowError, RuleException) as error:
            unknown = [name for name in targets if _is_unknown(name, error)]
            if unknown:
                close = nearest(unknown[0], (*TARGETS, *ONCE)).partition("; known")[0]
                why = f"no such target{close} Targets" if close else "no such target; targets"
                if unknown[0] in STAGES:
                    why = "a stage of several jobs is no target; targets"
                raise ConfigError(
                    f"{unknown[0]}: {why} are {', '.join(TARGETS)}, "
                    f"a stage of one job ({', '.join(ONCE)}), or files of results/"
                ) from error
            raise ConfigError(str(error).strip()) from error
