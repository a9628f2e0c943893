"""The server of the page: its files, labels, fields and uploads, for one machine unless it is told otherwise."""

import contextlib
import dataclasses
import gzip
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rfield import __version__
from rfield.segmentation.web.show_field import SHARES, PixelField, pixel_field
from rfield.segmentation.web.show_pictures import MOST_BYTES, Picture, Pictures, too_large
from rfield.segmentation.web.show_viewer import Viewer

_FILES = {
    "/": ("show.html", "text/html"),
    "/show.css": ("show.css", "text/css"),
    "/show.js": ("show.js", "text/javascript"),
}
# A Space of the Hugging Face Hub shows its page inside of a page of the Hub.
_FRAMES = "https://huggingface.co" if "SPACE_ID" in os.environ else "'none'"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {_FRAMES}"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def make_app(viewers: Sequence[Viewer], pictures: Pictures, hosts: Sequence[str] | None = None) -> ASGIApp:
    """Return the page as an ASGI app.

    Args:
        viewers: one network, or two to compare.
        pictures: the images to choose from.
        hosts: the names that a browser may call the server by, which keeps other sites from it (DNS rebinding); None
            allows every name.
    """
    page = _Page(viewers, pictures)
    routes = [Route(path, page.file) for path in _FILES] + [
        Route("/setup", page.setup),
        Route("/image", page.image),
        Route("/labels", page.labels),
        Route("/field", page.field),
        Route("/upload", page.upload, methods=["PUT"]),
    ]
    errors: Any = {ValueError: _refuse, KeyError: _refuse}
    return _Guard(Starlette(routes=routes, exception_handlers=errors), hosts)


class _Page:
    """The answers. Functions that compute run in Starlette's threads."""

    def __init__(self, viewers: Sequence[Viewer], pictures: Pictures) -> None:
        self._viewers = viewers
        self._pictures = pictures

    def file(self, request: Request) -> Response:
        name, kind = _FILES[request.url.path]
        return FileResponse(Path(__file__).with_name(name), media_type=kind)

    def setup(self, request: Request) -> Response:
        return JSONResponse(
            {
                "version": __version__,
                "models": [_describe(viewer) for viewer in self._viewers],
                "images": self._pictures.listed(),
                "shares": SHARES,
                "mostBytes": MOST_BYTES,
            }
        )

    def image(self, request: Request) -> Response:
        pixels = self._picture(request).pixels
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
        return Response(file.getvalue(), media_type="image/png")

    def labels(self, request: Request) -> Response:
        """Answer with one byte a pixel for the class, and then one for the probability in 255ths."""
        viewer, picture, dilations = self._viewer(request), self._picture(request), _dilations(request)
        begun = time.perf_counter()
        labels, confidence = viewer.labels(picture, dilations)
        content = gzip.compress(torch.stack([labels, confidence]).numpy().tobytes(), compresslevel=1)
        took = 1000 * (time.perf_counter() - begun)
        headers = {"content-encoding": "gzip", "x-milliseconds": f"{took:.0f}"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def field(self, request: Request) -> Response:
        """Answer with JSON: its length in 4 bytes, itself, and one byte a pixel for the effective field."""
        viewer, picture, dilations = self._viewer(request), self._picture(request), _dilations(request)
        x, y, share = (_number(request, name) for name in ("x", "y", "share"))
        found = pixel_field(viewer, picture, dilations, int(x), int(y), share)
        text = JSONResponse(_plain(found)).body
        content = len(text).to_bytes(4, "little") + bytes(text) + found.heat.numpy().tobytes()
        headers = {"content-encoding": "gzip"}
        body = gzip.compress(content, compresslevel=1)
        return Response(body, media_type="application/octet-stream", headers=headers)

    async def upload(self, request: Request) -> Response:
        """Keep the image that is the request's body."""
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > MOST_BYTES:
            return JSONResponse({"error": too_large(int(declared))}, 413)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                return JSONResponse({"error": too_large(None)}, 413)
        name = request.query_params.get("name", "upload")
        picture = await run_in_threadpool(self._pictures.add, name, bytes(data))
        return JSONResponse({"key": picture.key, "name": picture.name, "note": picture.note})

    def _viewer(self, request: Request) -> Viewer:
        number = request.query_params.get("model", "0")
        if number not in map(str, range(len(self._viewers))):
            raise KeyError(f"there is no network {number!r} on this page")
        return self._viewers[int(number)]

    def _picture(self, request: Request) -> Picture:
        return self._pictures.find(request.query_params.get("image", ""))


class _Guard:
    """Refuse requests for other hosts, and add headers that keep the page to itself."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        if scope["type"] == "http" and self._hosts is not None and _host(scope) not in self._hosts:
            refusal = PlainTextResponse("this page answers under its own address alone", 403)
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


def _host(scope: Scope) -> str | None:
    """Return the name or address that a request was sent to, without the port."""
    values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{values[0]}").hostname if len(values) == 1 else None
    return None


def _refuse(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error.args[0])}, 404 if isinstance(error, KeyError) else 400)


def _describe(viewer: Viewer) -> dict[str, Any]:
    names = [] if viewer.run is None else zip(viewer.run.class_names, viewer.run.palette, strict=False)
    return {
        "title": viewer.title,
        "weights": viewer.weights,
        "classes": [{"name": name, "colour": colour} for name, colour in names],
        "sliders": [dataclasses.asdict(slider) for slider in viewer.sliders],
    }


def _plain(found: PixelField) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "heat"}


def _dilations(request: Request) -> list[float] | None:
    """Return the dilations that a request names, or None for the learned ones."""
    text = request.query_params.get("dilations", "")
    try:
        return [float(each) for each in text.split(",")] if text else None
    except ValueError as error:
        raise ValueError(f"dilations are numbers with commas, such as 3,6, got {text[:40]!r}") from error


def _number(request: Request, name: str) -> float:
    text = request.query_params.get(name, "")
    try:
        return float(int(text)) if name in ("x", "y") else float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text[:40]!r}") from error
