"""The server's side of the patch shelf: routes under /forget-me-not."""

import asyncio
import functools
import json
import os

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


def _answer(content):
    # Compact, and without NaN, which no browser reads.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return web.Response(text=text, content_type="application/json")


def _told(handler):
    """Errors of the user become an answer with the sentence."""

    @functools.wraps(handler)
    async def wrapped(request):
        try:
            return await handler(request)
        except ForgetError as error:
            return web.json_response({"error": str(error)}, status=400)

    return wrapped


async def _body(request):
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
        raise ForgetError(f"The request is no JSON ({error}): reload the page.") from error
    if not isinstance(content, dict):
        raise ForgetError("The request has to be a JSON object: reload the page.")
    return content


def _base(kind, name):
    """(family, fingerprint) of a file that a loader offers; empty where the file does not tell."""
    if kind == DEMO:
        path = DEMO_FILE
    elif kind in CHECKPOINTS and name in folder_paths.get_filename_list(kind):
        path = folder_paths.get_full_path(kind, name)
    else:
        raise ForgetError(f"There is no {kind!r:.40} {name!r:.200}: refresh the list.")
    if path is None or not str(path).endswith(".safetensors"):
        return UNKNOWN
    stat = os.stat(path)
    return _base_of(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _base_of(path, time, size):
    return base_of(path)


def add_routes(routes, shelf):
    """Add the shelf's routes. Work on files is done in threads, off the event loop."""

    @routes.get(f"{ROUTE}/shelf")
    @_told
    async def patches(request):
        found = await asyncio.to_thread(shelf.entries)
        return await asyncio.to_thread(_answer, {"patches": found})

    @routes.get(f"{ROUTE}/shelf/picture")
    @_told
    async def picture(request):
        folder = request.query.get("folder", "")
        number = int(folder) if len(folder) < 4 and folder.isdecimal() else -1
        jpeg = await asyncio.to_thread(shelf.picture, number, request.query.get("name", ""))
        # The address changes with the file.
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=jpeg, content_type="image/jpeg", headers=headers)

    @routes.get(f"{ROUTE}/base")
    @_told
    async def base(request):
        asked = request.query.get("kind", ""), request.query.get("name", "")
        family, fingerprint = await asyncio.to_thread(_base, *asked)
        return _answer({"family": family, "base": fingerprint})

    def changing(name, change):
        @routes.post(f"{ROUTE}/shelf/{name}")
        @_told
        async def changed(request):
            body = await _body(request)
            done = await asyncio.to_thread(change, body)
            return _answer({"done": done})

    def named(body):
        return body.get("folder"), body.get("name")

    changing("delete", lambda body: shelf.delete(*named(body)))
    changing("rename", lambda body: shelf.rename(*named(body), body.get("to")))
    changing(
        "notes",
        lambda body: shelf.write_notes(*named(body), body.get("notes"), body.get("before")),
    )


def start():
    """Add the routes to the server that runs; without one, as in tools and tests, do nothing."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        add_routes(server.routes, Library(folder_paths.get_folder_paths(KIND)))
