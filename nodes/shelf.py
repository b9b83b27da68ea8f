"""The server's side of the patch shelf: routes under /forget-me-not."""

import asyncio
import functools
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import folder_paths
from aiohttp import web
from server import PromptServer

from ..fmn.errors import ForgetError
from ..fmn.patches.checkpoint import base_of
from ..fmn.patches.library import Library
from .demo import FILE as DEMO_FILE
from .patch import KIND

ROUTE = "/forget-me-not"
MAX_BODY = 1 << 16  # bytes of a request
CHECKPOINTS = "checkpoints", "diffusion_models"  # kinds of folders that hold bases
DEMO = "demo"
UNKNOWN = "", ""
MOST_BASES = 256  # files whose family and fingerprint are remembered

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _json(content: Any) -> web.Response:
    # Compact, and without NaN, which no browser reads.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return web.Response(text=text, content_type="application/json")


def _errors_as_json(handler: Handler) -> Handler:
    """Answer with the sentence of a user's error."""

    @functools.wraps(handler)
    async def wrapped(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ForgetError as error:
            return web.json_response({"error": str(error)}, status=400)

    return wrapped


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request.

    Other sites can make a browser send forms, but no JSON without asking the server first.
    """
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType
    if request.content_length is None:
        raise web.HTTPLengthRequired
    if request.content_length > MAX_BODY:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY, request.content_length)
    try:
        content = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise ForgetError(f"The request is not JSON ({error}): reload the page.") from error
    if not isinstance(content, dict):
        raise ForgetError("The request must be a JSON object: reload the page.")
    return content


class Bases:
    """What the model files are that loaders offer, each read once unless it changes."""

    def __init__(self) -> None:
        self._read = functools.lru_cache(MOST_BASES)(lambda path, time, size: base_of(path))

    def find(self, kind: str, name: str) -> tuple[str, str]:
        """(family, fingerprint) of a file; empty where the file does not say."""
        if kind == DEMO:
            path = DEMO_FILE
        elif kind in CHECKPOINTS and name in folder_paths.get_filename_list(kind):
            path = folder_paths.get_full_path(kind, name)
        else:
            raise ForgetError(f"There is no {kind!r:.40} {name!r:.200}: refresh the list.")
        if path is None or not str(path).lower().endswith(".safetensors"):
            return UNKNOWN
        stat = os.stat(path)
        return self._read(str(path), stat.st_mtime_ns, stat.st_size)


def start(server: PromptServer) -> None:
    """Add the shelf's routes to the server."""
    shelf = Library(folder_paths.get_folder_paths(KIND))
    _add_reading(server.routes, shelf, Bases())
    _add_changing(server.routes, shelf)


def _file_of(request: web.Request) -> tuple[int, str]:
    """A file's folder and name in a query, untrusted; the shelf checks them."""
    folder = request.query.get("folder", "")
    number = int(folder) if len(folder) < 4 and folder.isdecimal() else -1
    return number, request.query.get("name", "")


# Work on files is done in threads, off the event loop.


def _add_reading(routes: web.RouteTableDef, shelf: Library, bases: Bases) -> None:
    @routes.get(f"{ROUTE}/shelf")
    @_errors_as_json
    async def patches(request: web.Request) -> web.Response:
        entries = await asyncio.to_thread(shelf.entries)
        return await asyncio.to_thread(_json, {"patches": entries})

    @routes.get(f"{ROUTE}/shelf/picture")
    @_errors_as_json
    async def picture(request: web.Request) -> web.Response:
        jpeg = await asyncio.to_thread(shelf.picture, *_file_of(request))
        # The address changes with the file.
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=jpeg, content_type="image/jpeg", headers=headers)

    @routes.get(f"{ROUTE}/shelf/changed")
    @_errors_as_json
    async def changed(request: web.Request) -> web.Response:
        return _json({"changed": await asyncio.to_thread(shelf.is_changed, *_file_of(request))})

    @routes.get(f"{ROUTE}/base")
    @_errors_as_json
    async def base(request: web.Request) -> web.Response:
        asked = request.query.get("kind", ""), request.query.get("name", "")
        family, base = await asyncio.to_thread(bases.find, *asked)
        return _json({"family": family, "base": base, "sketch": getattr(base, "sketch", ())})


def _add_changing(routes: web.RouteTableDef, shelf: Library) -> None:
    def delete(folder: Any, name: Any, body: dict[str, Any]) -> Any:
        return shelf.delete(folder, name)

    def rename(folder: Any, name: Any, body: dict[str, Any]) -> Any:
        return shelf.rename(folder, name, body.get("to"))

    def notes(folder: Any, name: Any, body: dict[str, Any]) -> Any:
        return shelf.write_notes(folder, name, body.get("notes"), body.get("before"))

    def add(change: Callable[[Any, Any, dict[str, Any]], Any]) -> None:
        @routes.post(f"{ROUTE}/shelf/{change.__name__}")
        @_errors_as_json
        async def changed(request: web.Request) -> web.Response:
            body = await _body(request)
            file = body.get("folder"), body.get("name")  # untrusted; the shelf checks them
            return _json({"done": await asyncio.to_thread(change, *file, body)})

    for change in (delete, rename, notes):
        add(change)
