"""What the next run would do, by `hemera plan` in a process of its own.

Snakemake changes loggers and the working directory of its process, and may end it.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any


async def plan(configfile: Path, targets: tuple[str, ...]) -> dict[str, Any]:
    """Return what `hemera plan --json` writes, or its errors as `error`."""
    command = [sys.executable, "-m", "hemera", "plan", *targets, "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, "--configfile", str(configfile),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()
    try:
        found: dict[str, Any] = json.loads(out)
    except ValueError:
        return {"error": errors.decode(errors="replace").strip() or "hemera plan wrote nothing"}
    return found
