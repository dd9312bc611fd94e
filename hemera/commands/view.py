"""Inspect the results of a study in the browser, and decide on its pairs."""

import contextlib
import logging
import os
import secrets
import socket
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from hemera.commands import ConfigFile
from hemera.config import load_file
from hemera.errors import ConfigError

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"


def view(
    folder: Path = Path(),
    /,
    *targets: str,
    configfile: ConfigFile = Path("config.yaml"),
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 0,
    browser: bool = True,
) -> None:
    """Show the results of a study in the browser, until Ctrl-C.

    Pairs at full resolution, HER2 warped onto H&E. A decision on a pair is written into the sheet,
    of which a backup is made, and the page states what the next run would repeat. Only this
    machine can connect, and only with the address that is printed.

    Args:
        folder: of the study.
        targets: of Snakemake, such as data, for which the next run is planned; by default all.
        configfile: the configuration of the workflow, relative to the folder.
        port: of this machine; 0: a free one.
        browser: open the browser.
    """
    import uvicorn

    from hemera.view.server import application

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a study")
    os.chdir(folder)
    load_file(configfile)
    with socket.socket() as bound, contextlib.suppress(KeyboardInterrupt):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((ADDRESS, port))
            # From now on the browser waits instead of being refused.
            bound.listen()
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror}; give another, or none for a free one"
            ) from error
        number = bound.getsockname()[1]
        token = secrets.token_urlsafe(24)
        hosts = f"{ADDRESS}:{number}", f"localhost:{number}"
        address = f"http://{ADDRESS}:{number}/{token}/"
        log.info("%s", address)
        log.info("the address contains the key to this page; Ctrl-C ends it")
        if browser:
            webbrowser.open(address)
        settings = uvicorn.Config(
            application(configfile, token, hosts, targets),
            log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(settings).run(sockets=[bound])
