"""The server of the pages: one study, one user, on this machine only."""

import asyncio
import contextlib
import math
import os
import re
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from hemera.config import FilterOptions
from hemera.dataset.criteria import MEASURES
from hemera.errors import HemeraError
from hemera.imaging.codecs import decode, encode, suffix
from hemera.reports import pictures
from hemera.reports.html import TEMPLATES
from hemera.sheet import Pair
from hemera.view import networks
from hemera.view.cohort import overview
from hemera.view.decisions import Backups, decide
from hemera.view.guard import Guard
from hemera.view.pixels import QUALITY, Pixels, version
from hemera.view.plan import plan
from hemera.view.settings import save_filter
from hemera.view.study import Study
from hemera.view.thresholds import Decided, Thresholds, controls

STATIC = Path(__file__).parent / "static"
BODY_MAX = 64 * 2**10
"""Bytes of a request."""
KEPT = {"Cache-Control": "private, max-age=86400, immutable"}
"""Of pixels, whose address changes with their content."""
CLOSED = 499
"""Status of a request whose browser no longer waits."""


def application(
    configfile: Path, token: str, hosts: tuple[str, ...], targets: tuple[str, ...] = ()
) -> ASGIApp:
    """Return the application for the study of the working directory.

    Args:
        token: first part of every address.
        hosts: names with port by which the browser may call it.
        targets: of Snakemake, for the plan; none: all.
    """
    server = _Server(Study(configfile), targets)
    routes = [
        Route("/api/pairs", server.pairs),
        Route("/api/pair/{pair}", server.pair),
        Route("/api/cells/{tile}/{engine}", server.cells),
        Route("/api/decide", server.decide, methods=["POST"]),
        Route("/api/controls", server.controls),
        Route("/api/cohort", server.cohort),
        Route("/api/split/{tile}", server.split),
        Route("/api/limits", server.limits, methods=["POST"]),
        Route("/api/tiles", server.tiles, methods=["POST"]),
        Route("/api/save", server.save, methods=["POST"]),
        Route("/api/plan", server.plan),
        Route("/tile/{pair}/{stain}/{level:int}/{column:int}/{row:int}", server.tile),
        Route("/picture/{tile}/{name}", server.picture),
        Route("/contours/{tile}/{engine}", server.contours),
        Route("/style.css", server.style),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # A daemon, so that Ctrl-C does not wait for the pixels of a large slide.
        threading.Thread(target=server.open_first, daemon=True).start()
        yield

    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        lifespan=lifespan,
        exception_handlers={HTTPException: _outside, HemeraError: _fault},
    )
    return Guard(app, token, hosts)


def _outside(request: Request, error: Exception) -> Response:
    """Answer a request for what is not part of the study."""
    return PlainTextResponse("outside the study\n", status_code=403)


def _fault(request: Request, error: Exception) -> Response:
    """Answer a request that cannot be fulfilled with the words of the error."""
    return JSONResponse({"error": str(error)}, status_code=400)


class Json(JSONResponse):
    """JSON, in which numbers that are not finite are null."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of an answer."""
        return super().render(_finite(content))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Server:
    """The answers; what reads pixels or tables works in as many threads as there are processors."""

    def __init__(self, study: Study, targets: tuple[str, ...]) -> None:
        self.study, self.targets = study, targets
        self.pixels, self.backups, self.thresholds = Pixels(), Backups(), Thresholds()
        self._workers = asyncio.Semaphore(max(2, os.cpu_count() or 1))
        self._planning = asyncio.Lock()

    def open_first(self) -> None:
        """Read the whole of both stains of the pair that is shown first, while the page loads."""
        with contextlib.suppress(HemeraError, OSError):
            first = next(iter(self.study.pairs()), None)
            pair = self.study.pair(first["pair"]) if first else None
            if pair is not None:
                for stain in ("he", "her2"):
                    self.pixels.jpeg(pair, stain, 0, 0, 0)

    async def _work(self, request: Request, work: Callable[[], Any]) -> Any:
        """Return the result of `work`; HTTPException if the browser has given up meanwhile."""
        async with self._workers:
            if await request.is_disconnected():
                raise HTTPException(CLOSED)
            return await run_in_threadpool(work)

    async def pairs(self, request: Request) -> Response:
        """Answer with the list of pairs."""
        return Json(await self._work(request, self.study.pairs))

    async def pair(self, request: Request) -> Response:
        """Answer with everything about a pair but its pixels."""
        row = self._known(request)

        def facts() -> dict[str, Any]:
            with self.pixels.pair(row) as opened:
                return {**self.study.facts(row, opened), "version": version(row)}

        return Json(await self._work(request, facts))

    def _known(self, request: Request) -> Pair:
        found = self.study.pair(request.path_params["pair"])
        if found is None:
            raise HTTPException(403)
        return found

    async def tile(self, request: Request) -> Response:
        """Answer with a tile of a stain on the grid of H&E."""
        row, found = self._known(request), request.path_params
        if found["stain"] not in ("he", "her2"):
            raise HTTPException(403)
        place = found["stain"], found["level"], found["column"], found["row"]
        data = await self._work(request, lambda: self.pixels.jpeg(row, *place))
        return Response(data, media_type="image/jpeg", headers=KEPT)

    async def picture(self, request: Request) -> Response:
        """Answer with a picture of a tile of the data set: a stain, or HER2 with contours.

        With `side`, shrunk to a longest side of so many pixels.
        """
        name, side = request.path_params["name"], request.query_params.get("side", "")
        if side and not re.fullmatch("[1-9][0-9]{1,3}", side, re.ASCII):
            raise HTTPException(403)

        def read() -> bytes:
            row = self._tile(request)
            if name in ("he", "her2") and not side:
                return self.study.picture(row, name)
            rgb = self._drawn(row, name)
            return encode(pictures.shrink(rgb, int(side)) if side else rgb, quality=QUALITY)

        data = await self._work(request, read)
        kind = {"jpg": "image/jpeg", "png": "image/png"}[suffix(data)]
        return Response(data, media_type=kind)

    async def contours(self, request: Request) -> Response:
        """Answer with the contours of the mask of a tile, PNG with a transparent background."""

        def read() -> bytes:
            mask = self.study.mask(self._tile(request), request.path_params["engine"])
            drawn = pictures.outlined(np.zeros((*mask.shape, 3), np.uint8), mask)
            return pictures.transparent(drawn)

        data = await self._work(request, read)
        return Response(data, media_type="image/png")

    async def cells(self, request: Request) -> Response:
        """Answer with the cells of a tile."""
        engine = request.path_params["engine"]
        found = await self._work(request, lambda: self.study.cells(self._tile(request), engine))
        return JSONResponse(found)

    def _tile(self, request: Request) -> dict[str, Any]:
        found = self.study.tile(request.path_params["tile"])
        if found is None:
            raise HTTPException(403)
        return found

    async def decide(self, request: Request) -> Response:
        """Write a decision into the sheet."""
        given = await _body(request, {"pair": str, "verdict": str, "reason": str})
        copy = await run_in_threadpool(
            decide, self.study.sheet_path, given["pair"], given["verdict"], given["reason"],
            self.backups,
        )  # fmt: skip
        sheet = str(self.study.sheet_path)
        return JSONResponse({"sheet": sheet, "backup": copy and copy.name})

    async def controls(self, request: Request) -> Response:
        """Answer with the limits of stage filter."""

        def found() -> dict[str, Any]:
            decided = self._decided({})
            return {
                "controls": controls(decided.table, self._filter()),
                "columns": decided.columns,
                "titles": {name: title for name, (title, _) in MEASURES.items()},
                "reasons": self.study.reasons,
                "engines": decided.engines,
                "networks": list(networks.trained(self._generator)),
                "demo": self.study.config.cohort.preset == "demo",
                "configfile": str(self.study.configfile),
            }

        return Json(await self._work(request, found))

    async def cohort(self, request: Request) -> Response:
        """Answer with the overview of the cohort."""
        return Json(await self._work(request, lambda: overview(self.study, self._decided({}))))

    async def split(self, request: Request) -> Response:
        """Answer with the split of a tile for each network."""
        name = self._tile(request)["tile"]
        return JSONResponse(await self._work(request, lambda: self.study.splits(name)))

    @property
    def _generator(self) -> str:
        return self.study.config.generators[0]

    def _drawn(self, row: dict[str, Any], name: str) -> Any:
        """Return a picture of a tile (H, W, 3)."""
        if name in ("he", "her2"):
            return decode(self.study.picture(row, name))
        if name not in (networks.VIRTUAL, networks.PREDICTION):
            return self.study.outlined(row, name)
        mask = self.study.mask(row, self.study.engines[0])
        read = partial(self.study.picture, row)
        return networks.picture(name, self._generator, row, read, mask)

    def _filter(self) -> FilterOptions:
        return self.study.config.options(FilterOptions)

    def _decided(self, limits: dict[str, Any]) -> Decided:
        options = self._filter().replace(**limits)
        return self.thresholds.decided(self.study.tiles, options, self.study.engines)

    async def limits(self, request: Request) -> Response:
        """Answer with the decisions of stage filter by other limits: counts, and a pair's tiles."""
        given = await _body(request, {"limits": dict, "pair": str})

        def found() -> dict[str, Any]:
            decided = self._decided(given["limits"])
            return {**decided.outcome(), "decisions": decided.of_pair(given["pair"])}

        return Json(await self._work(request, found))

    async def tiles(self, request: Request) -> Response:
        """Answer with a page of the table of tiles, decided by other limits."""
        given = await _body(request, {"limits": dict, "query": dict})
        return Json(
            await self._work(request, lambda: self._decided(given["limits"]).page(given["query"]))
        )

    async def save(self, request: Request) -> Response:
        """Write limits of stage filter into the configuration."""
        given = await _body(request, {"limits": dict})
        options = self._filter().replace(**given["limits"])
        path = self.study.configfile
        copy = await run_in_threadpool(save_filter, path, options, self.backups)
        return JSONResponse({"configfile": str(path), "backup": copy and copy.name})

    async def plan(self, request: Request) -> Response:
        """Answer with what the next run would do."""
        async with self._planning:
            return JSONResponse(await plan(self.study.configfile, self.targets))

    async def style(self, request: Request) -> Response:
        """Answer with the style sheet of the reports."""
        return FileResponse(TEMPLATES / "style.css")


async def _body(request: Request, types: dict[str, type]) -> dict[str, Any]:
    """Return the JSON object of a request, with these keys of these types; HTTPException else."""
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(403)
    if int(request.headers.get("content-length", BODY_MAX + 1)) > BODY_MAX:
        raise HTTPException(403)
    try:
        given = await request.json()
    except ValueError as error:
        raise HTTPException(403) from error
    fits = isinstance(given, dict) and given.keys() == types.keys()
    if not fits or not all(isinstance(given[name], kind) for name, kind in types.items()):
        raise HTTPException(403)
    return dict(given)
