"""What every HTTP request passes first: its ID, keys, the size of its body, and whether its client is still there."""

import asyncio
import hashlib
import hmac
import re
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi.responses import ORJSONResponse, Response

from feyntune.constants import RELEASE_HEADER, VERSION
from feyntune.errors import UserError
from feyntune.serving.completions import OWNER, ApiError, Limits
from feyntune.serving.workbench import FILES
from feyntune.telemetry import log

_KSERVE_V1 = "/v1/models"
_OPENAI = ("/openai", "/v1/", "/tokenize", "/detokenize")
# Probes, scrapers and browsers have no key.
OPEN = ("/", "/metrics", "/health", "/ping", "/version", "/v2/health/live", "/v2/health/ready")


class Keys:
    """Bearer keys in a file, one a line; read again whenever the file changes.

    Keys are compared by their hashes in constant time, and never logged or shown.

    Raises:
        UserError: the file cannot be read or holds no key (at start only: later the old keys stay).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._hashes: list[bytes] = []
        try:
            self._read()
        except OSError as e:
            raise UserError(f"Keys file {path} cannot be read ({e.strerror}): mount it, or leave keys out.") from e
        except ValueError as e:
            raise UserError(f"Keys file {path} is not UTF-8 text: write one key a line.") from e
        if not self._hashes:
            raise UserError(f"Keys file {path} holds no key: write one a line.")

    def owner(self, authorization: str | None) -> str | None:
        """Which of the keys an Authorization header carries, by its hash; None where it carries none of them."""
        try:
            self._read()
        except (OSError, ValueError) as e:  # ValueError: it is not UTF-8
            log.warning("keys: %s cannot be read (%s); the keys read before still hold", self.path, type(e).__name__)
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", errors="replace")).digest()  # the header's own bytes
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all of them, whichever matches
        return given.hex()[:16] if scheme.lower() == "bearer" and any(matches) else None

    def _read(self) -> None:
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._stamp:
            return
        lines = [line.strip() for line in self.path.read_text("utf-8").splitlines()]
        self._hashes = [hashlib.sha256(k.encode()).digest() for k in lines if k and not k.startswith("#")]
        if self._stamp is not None:
            log.info("keys: read again, %d keys", len(self._hashes))
        self._stamp = stamp


_RELEASE = (RELEASE_HEADER.encode(), VERSION.encode())
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class _Answer:
    """ASGI's `send`, with the request's ID in the headers."""

    def __init__(self, scope: Any, send: Any):
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        self.id: bytes = given if _REQUEST_ID.fullmatch(given) else uuid4().hex.encode()
        self.asked = f"{scope['method']} {scope['path'][:200]}"
        self.probe = scope["path"] in OPEN  # whose 503 is no fault
        self.send, self.arrived, self.begun = send, time.monotonic(), False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id), _RELEASE]
            if message["status"] >= 500 and not self.probe:
                took = time.monotonic() - self.arrived
                log.warning("%s: %d after %.1f s (request %s)", self.asked, message["status"], took, self.id.decode())
        await self.send(message)


class RequestGuard:
    """ASGI middleware. Reads the whole body first; stops the work of a client that has gone away.

    Every answer carries an X-Request-Id, the client's own or a new one; it stands in the log beside every fault of
    the server's.
    """

    def __init__(self, app: Any, limits: Limits, keys: Keys | None):
        self.app, self.keys = app, keys
        self.body_bytes, self.body_seconds = limits.body_bytes, limits.body_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # every GET has one; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        send = _Answer(scope, send)
        try:
            self._check_key(scope)
            body = await self._body(receive)
        except ApiError as e:
            await error_response(scope["path"], e)(scope, receive, send)
            return
        if body is not None:
            await self._watched(scope, receive, send, body)

    def _check_key(self, scope: Any) -> None:
        if self.keys is not None and scope["path"] not in OPEN and not scope["path"].startswith(FILES):
            authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            owner = self.keys.owner(authorization)
            if owner is None:
                raise ApiError(401, "invalid_api_key", "Give a valid key: Authorization: Bearer KEY.")
            OWNER.set(owner)

    async def _body(self, receive: Any) -> bytes | None:
        """The whole body; None if the client went away while sending it."""
        parts: list[bytes] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self.body_seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as e:
                message = f"The body did not arrive within {self.body_seconds:g} s."
                raise ApiError(408, "body_timeout", message) from e
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body_bytes:
                raise ApiError(413, "body_too_large", f"The body is over the limit of {self.body_bytes} bytes.")
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _watched(self, scope: Any, receive: Any, send: _Answer, body: bytes) -> None:
        gone = asyncio.Event()
        given = False

        async def replay() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.create_task(self.app(scope, replay, send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            error = None if work.cancelled() else work.exception()
            if error is not None:
                log.error("%s failed (request %s)", send.asked, send.id.decode(), exc_info=error)
                if not send.begun:
                    message = "The server failed; its log says why, beside this answer's X-Request-Id."
                    failed = error_response(scope["path"], ApiError(500, "internal_error", message))
                    await failed(scope, receive, send)
        finally:
            for task in (work, watcher):
                task.cancel()


def error_response(path: str, error: ApiError) -> Response:
    """`error` in OpenAI's shape on OpenAI's paths, in KServe's elsewhere."""
    openai = path.startswith(_OPENAI) and not path.startswith(_KSERVE_V1)
    body = error.body if openai else {"error": error.message}
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status in (500, 504):
        headers["x-should-retry"] = "false"  # OpenAI's clients would repeat minutes of work
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ORJSONResponse(body, error.status, headers)
