"""Runs over HTTP, for the page: what they do, their pictures and reports, and Stop, Resume and Save.

All that reads or writes files is done in threads of our own: ComfyUI's event loop waits for none of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from server import PromptServer

from srpo_core import launch, result, run_view
from srpo_core.config import ConfigError, RunConfig
from srpo_core.report.page import POLICY
from srpo_core.run_pictures import NoPreview, preview_jpeg
from srpo_core.run_state import ask_to_stop, read_state

from . import run_safety
from .run_names import runs_folder
from .training_models import environment

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

EVENT = "srpo.run"
"""The message to all pages that a node has begun to show a run."""
MOST_NODES = 500
MOST_BODY = 4096
REPORT_POLICY = f"sandbox; {POLICY}"
"""What a report page may do in ComfyUI's origin: be looked at."""
_threads = ThreadPoolExecutor(4, thread_name_prefix="srpo-routes")
_saving = threading.Lock()
_shown: dict[str, str] = {}
"""Which run a node showed last, by the node's id."""


class BadRequest(ValueError):
    """A request that is not as it should be."""


def tell(node: str, run: str) -> None:
    """Tell all pages, those that come later too, that a node shows a run."""
    _shown.pop(str(node), None)
    _shown[str(node)] = run
    while len(_shown) > MOST_NODES:
        del _shown[next(iter(_shown))]
    PromptServer.instance.send_sync(EVENT, {"node": str(node), "run": run})


def register() -> None:
    """Add the routes to ComfyUI's server, once; nothing where there is no server."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "").startswith("/srpo/") for route in server.routes):
        return
    for path, handler in (
        ("/srpo/runs", _runs),
        ("/srpo/runs/{name}", _run),
        ("/srpo/runs/{name}/preview.jpg", _preview),
        ("/srpo/runs/{name}/report", _report),
    ):
        server.routes.get(path)(_answered(handler))
    for path, action in (("stop", _stop), ("resume", _resume), ("save", _save)):
        server.routes.post(f"/srpo/runs/{{name}}/{path}")(_answered(_posted(action)))


def _answered(handler: Handler) -> Handler:
    """The handler, whose errors become JSON."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (run_view.NoRun, NoPreview) as error:
            status, text = 404, str(error)
        except BadRequest as error:
            status, text = 400, str(error)
        except ConfigError as error:
            status, text = 409, str(error)
        except Exception as error:  # a run's folder may hold anything; ComfyUI's log has the rest
            logging.exception("SRPO: %s %s failed", request.method, request.path)
            status, text = 500, f"{type(error).__name__}: {error}"
        return _json({"error": text}, status)

    return answer


async def _in_thread(work: Callable[..., Any], *given: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, work, *given)


def _json(data: Any, status: int = 200) -> web.Response:
    return web.json_response(data, status=status, headers={"Cache-Control": "no-store"})


def _folder(request: web.Request) -> Path:
    """The folder of the run that a request names. NoRun if there is none."""
    return run_view.find_run(runs_folder(), request.match_info["name"])


def _number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of a request's query, cut to its limits."""
    text = request.query.get(name, "")
    if not text:
        return default
    try:
        return max(least, min(int(text), most))
    except ValueError:
        raise BadRequest(f"{name}={text[:40]!r} is no whole number") from None


async def _runs(request: web.Request) -> web.Response:
    """All runs, and which node shows which."""

    def work() -> dict[str, Any]:
        runs = run_view.summaries(runs_folder())
        names = {run["name"] for run in runs}
        return {"runs": runs, "nodes": {node: run for node, run in [*_shown.items()] if run in names}}

    return _json(await _in_thread(work))


async def _run(request: web.Request) -> web.Response:
    """One run with its curves."""
    after, log = _number(request, "after", -1, -1, 10**9), _number(request, "log", 0, 0, run_view.MOST_LOG_LINES)
    return _json(await _in_thread(lambda: run_view.detail(_folder(request), after, log)))


async def _preview(request: web.Request) -> web.Response:
    """The before | now picture of a run."""
    step = _number(request, "step", 0, 0, 10**9) if request.query.get("step") else None
    columns, width = _number(request, "columns", 4, 1, 16), _number(request, "width", 1600, 128, 6000)

    def work() -> bytes:
        folder = _folder(request)
        config = run_view.run_config(folder)
        if config is None:
            raise NoPreview(f"{folder / run_view.RECORD} can't be read")
        return preview_jpeg(folder, (config.data.height, config.data.width), step, columns, width)

    picture = await _in_thread(work)
    tag = f'"{hashlib.sha256(picture).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # kept by browsers, and asked for again each time
    if tag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    return web.Response(body=picture, content_type="image/jpeg", headers=headers)


async def _report(request: web.Request) -> web.Response:
    """The report page of a run."""
    html = await _in_thread(lambda: run_view.report(_folder(request)))
    headers = {
        "Content-Security-Policy": REPORT_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return web.Response(text=html, content_type="text/html", charset="utf-8", headers=headers)


def _posted(action: Callable[[Path, Mapping[str, Any]], None]) -> Handler:
    """A handler that does something to a run, and answers with its summary."""

    async def handler(request: web.Request) -> web.Response:
        _check_origin(request)
        told = await _body(request)

        def work() -> dict[str, Any]:
            folder = _folder(request)
            action(folder, told)
            return run_view.summary(folder)

        return _json(await _in_thread(work))

    return handler


def _check_origin(request: web.Request) -> None:
    """BadRequest for what another site's page sends; programs that are no browser say nothing of where they are."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower()
    if not same:
        raise BadRequest("the request comes from another site's page")


async def _body(request: web.Request) -> Mapping[str, Any]:
    if request.content_type != "application/json":
        raise BadRequest("Content-Type must be application/json")
    if request.content_length is None or request.content_length > MOST_BODY:
        raise BadRequest(f"the body must be JSON of at most {MOST_BODY} bytes")
    try:
        told = json.loads(await request.text())
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise BadRequest("the body must be a JSON object, such as {}")
    return told


def _stop(folder: Path, told: Mapping[str, Any]) -> None:
    """Have the run save and end; with "now", end its processes."""
    state = read_state(folder)
    if state is None or not state.active:
        raise ConfigError(f"{folder.name} is not at work")
    if told.get("now") is True:
        launch.kill(state)
    else:
        ask_to_stop(folder)


def _resume(folder: Path, told: Mapping[str, Any]) -> None:
    """Go on with the run, with more steps if "steps" says so; ComfyUI's models make room when its queue is at rest."""
    steps = told.get("steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise BadRequest(f"steps={steps!r} is no number of steps")
    launch.resume(folder, steps, environment(), check=lambda config: _check_resumed(config, folder))
    PromptServer.instance.prompt_queue.set_flag("unload_models", True)


def _check_resumed(config: RunConfig, folder: Path) -> None:
    run_safety.check(config, folder)
    if config.parallel.nodes > 1:
        raise ConfigError(
            f"parallel.nodes={config.parallel.nodes}: {folder.name} trains on several machines; start it again on each"
            f" of them, by {folder / 'scripts' / 'multi_host.sh'} or by SRPO Train"
        )


def _save(folder: Path, told: Mapping[str, Any]) -> None:
    """Write the newest checkpoint's weights beside the run's result."""
    if not _saving.acquire(blocking=False):
        raise ConfigError("a run is being saved already; try again when that is done")
    try:
        result.save_now(folder, check=lambda config: run_safety.check(config, folder))
    finally:
        _saving.release()
