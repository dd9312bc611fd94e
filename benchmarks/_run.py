"""Run the benchmarks one after the other, and write what they print into RESULTS.md.

A benchmark that fails or takes too long costs its own section; the exit status is then not 0. With
names, only these run; the sections of the others stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
LONG = ("registration", "registration_error")
"""Those that run the registration engine for hours: only with ``--images``."""
LIMIT_S = 30 * 60
LIMIT_WITH_IMAGES_S = 3 * 60 * 60
HEAD = """# Results of the benchmarks

What the scripts beside this file print: times are processor time, taken in turn with what they are
compared to; a spread is in brackets. `make bench` writes this file, `make bench ONLY="reading
plan"` two of its sections. What each measures, and how, is described at the top of the script.
"""


def run(script: Path, words: list[str], limit_s: float) -> tuple[str, str | None]:
    """Run a script, showing what it prints; return that, and what went wrong."""
    process = subprocess.Popen(
        [sys.executable, str(script), *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, stop)
    timer.start()
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line.rstrip())
        status = process.wait()
    finally:
        timer.cancel()
        # Its session is its own, so that nobody's keyboard reaches it.
        if process.poll() is None:
            stop()
    fault = None
    if late.is_set():
        fault = f"stopped after {limit_s:.0f} s"
    elif status:
        fault = f"failed with exit status {status}"
    return "\n".join(lines), fault


def read_sections() -> dict[str, str]:
    """Return the sections of RESULTS.md by script, without their headings."""
    text = RESULTS.read_text() if RESULTS.is_file() else ""
    parts = re.split(r"^## `(\w+\.py)`$", text, flags=re.MULTILINE)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def main() -> None:
    """Run what is asked for; RESULTS.md is written after each."""
    scripts = {path.stem: path for path in sorted(HERE.glob("[a-z]*.py"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("only", nargs="*", help=f"some of {', '.join(scripts)}; none: all")
    parser.add_argument(
        "--images", type=Path, help="folder of real images: runs those that take hours too"
    )
    given = parser.parse_args()
    unknown = sorted(set(given.only) - set(scripts))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(scripts)}")
    faults = []
    for name in given.only or scripts:
        words, limit_s = [], LIMIT_S
        if given.images and '"--images"' in scripts[name].read_text():
            words, limit_s = ["--images", str(given.images.resolve())], LIMIT_WITH_IMAGES_S
        elif name in LONG and not given.only:
            continue
        sys.stdout.write(f"\n{name}.py {' '.join(words)}\n")
        text, fault = run(scripts[name], words, limit_s)
        said = f"{os.cpu_count()} processors, {datetime.date.today()}"
        if fault:
            faults.append(f"{name}.py {fault}")
            said += f"; {fault}"
        sections = {**read_sections(), f"{name}.py": f"{said}.\n\n```\n{text}\n```"}
        parts = [f"## `{script}`\n\n{body}\n" for script, body in sorted(sections.items())]
        RESULTS.write_text("\n".join([HEAD, *parts]))
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
