"""The workbench: the page at `/`, built from workbench/ by `make workbench`, and the headers that fence it in.

Browsers ask for text/html and get the page; everybody else gets what KServe's V1 says there, its liveness.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import ORJSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
FILES = "/workbench/"  # the page's files, served without a key: the page asks for one
HEADERS = {
    # Only what this server serves, nothing inline, no form that leaves, nobody's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class _Files(StaticFiles):
    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(full_path, *args, **kwargs)
        hashed = Path(full_path).parent != PAGE  # a file under a name that holds its hash never changes
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if hashed else "no-cache"
        response.headers.update(HEADERS)
        return response


def add_workbench(app: FastAPI, on: bool, live: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Serve the page at `/` and its files below `/workbench/`; with `on` False a browser gets a 404 there.

    Args:
        live: KServe's liveness, the answer at `/` to all that are no browsers.
    """
    built = (PAGE / "index.html").is_file()
    files = _Files(directory=PAGE, check_dir=False)

    async def root(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            response: Response = ORJSONResponse(await live())
        elif not on:
            response = PlainTextResponse("The workbench is switched off on this endpoint.\n", 404)
        elif not built:
            message = "The workbench is not built: run `make workbench` and start the endpoint again.\n"
            response = PlainTextResponse(message, 503)
        else:
            response = await files.get_response("index.html", request.scope)
        response.headers["Vary"] = "Accept"
        return response

    app.add_api_route("/", root, methods=["GET", "HEAD"], include_in_schema=False)
    if on and built:
        app.mount(FILES, _Files(directory=PAGE / "workbench"))
