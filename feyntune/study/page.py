"""The page a rater scores on: plain forms, so it works without script; a script adds keys for the scores.

Every score is on disk before the next text is shown. A rater's link holds a random token; who has the link can score
as that rater. Only the study is needed here, not its key.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from feyntune.artifacts.artifact import open_artifact
from feyntune.errors import UserError
from feyntune.study.study import SCALE, check, read_sheet, sheet
from feyntune.tex import set_formulas

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LARGEST = 64 * 1024  # bytes of a form
LONGEST = 4000  # characters of a comment


class ScoreStore:
    """The sheets of a study with the scores given so far, kept in `scores/RATER.csv`.

    Raises:
        UserError: a file of scores is damaged or another study's (file, line, field, fix).
    """

    def __init__(self, study: str | Path, scores: str | Path):
        open_artifact(study, "study")
        self.folder = Path(scores)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about = json.loads((Path(study) / "study.json").read_text(encoding="utf-8"))
        self.lock = threading.Lock()
        self.sheets: dict[str, list[dict[str, Any]]] = {}
        for rater in self.about["raters"]:
            rows = [row for _, row in read_sheet(Path(study) / "sheets" / f"{rater}.csv")]
            path = self.folder / f"{rater}.csv"
            items = {row["item"]: {"rater": rater, "item": row["item"]} for row in rows}
            given, problems = check([path] if path.is_file() else [], self.about["study"], items)
            if problems:
                raise UserError("Scores given earlier cannot be read:\n" + "\n".join(f"  {p}" for p in problems))
            scored = {g["item"]: g for g in given}
            for row in rows:
                row["score"] = scored.get(row["item"], {}).get("score", "")
                row["comment"] = scored.get(row["item"], {}).get("comment") or ""
            self.sheets[rater] = rows
        self.raters = self._links()

    def _links(self) -> dict[str, str]:
        """Raters by token; the same tokens after a restart."""
        path = self.folder / "links.json"
        links = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for rater in self.sheets:
            links.setdefault(rater, secrets.token_urlsafe(16))
        _write(path, json.dumps(links, indent=1), mode=0o600)
        return {token: rater for rater, token in links.items() if rater in self.sheets}

    def save(self, rater: str, number: int, score: int, comment: str) -> None:
        """Keep a score; it is on disk when this returns."""
        with self.lock:
            before = dict(self.sheets[rater][number - 1])
            self.sheets[rater][number - 1].update(score=score, comment=comment)
            try:
                _write(self.folder / f"{rater}.csv", "\ufeff" + sheet(self.sheets[rater]), mode=0o644)
            except OSError:
                self.sheets[rater][number - 1] = before
                raise

    def open_after(self, rater: str, number: int) -> int | None:
        """The next text without a score after `number`, from the beginning again after the last; None if all have."""
        rows = self.sheets[rater]
        order = [*range(number, len(rows)), *range(number)]
        return next((i + 1 for i in order if rows[i]["score"] == ""), None)


def _write(path: Path, text: str, mode: int) -> None:
    tmp = path.with_suffix(".tmp")
    with os.fdopen(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def application(store: ScoreStore) -> FastAPI:
    """The web application over `store`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tex"] = set_formulas
    template = environment.get_template("study.html.jinja")
    static = {name: (here / name).read_text(encoding="utf-8") for name in ("study.css", "study.js")}

    def page(status: int = 200, **given: Any) -> HTMLResponse:
        everything = {"problem": None, "done": None, "row": None, **given}
        return HTMLResponse(template.render(scale=SCALE, **everything), status)

    def rows_of(token: str) -> tuple[str, list[dict[str, Any]]]:
        rater = store.raters.get(token)
        if rater is None:
            raise HTTPException(404, "This link belongs to no rater of the study. Open the link you were given.")
        return rater, store.sheets[rater]

    def text(token: str, number: int, problem: str | None = None) -> HTMLResponse:
        _, rows = rows_of(token)
        if not 1 <= number <= len(rows):
            raise HTTPException(404, f"There is no text {number}, only 1 to {len(rows)}.")
        row = rows[number - 1]
        prompts = list(dict.fromkeys(r["prompt"] for r in rows))
        same = [r["item"] for r in rows if r["prompt"] == row["prompt"]]
        return page(
            422 if problem else 200,
            token=token,
            row=row,
            number=number,
            total=len(rows),
            scored=sum(r["score"] != "" for r in rows),
            paper=prompts.index(row["prompt"]) + 1,
            papers=len(prompts),
            place=same.index(row["item"]) + 1,
            places=len(same),
            rubric=store.about["rubric"],
            problem=problem,
            longest=LONGEST,
        )

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not (length.isascii() and length.isdigit() and int(length) <= LARGEST):
            response: Response = page(413, problem="That was too long to be a score.")
        else:
            response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    @app.exception_handler(HTTPException)
    async def error_page(request: Request, error: HTTPException) -> HTMLResponse:
        known = error.status_code == 404 and error.detail != "Not Found"
        return page(error.status_code, problem=error.detail if known else "There is nothing here.")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/study.css")
    def css() -> Response:
        return Response(static["study.css"], media_type="text/css")

    @app.get("/study.js")
    def js() -> Response:
        return Response(static["study.js"], media_type="text/javascript")

    @app.get("/r/{token}")
    def start(token: str) -> Response:
        rater, _ = rows_of(token)
        return RedirectResponse(f"/r/{token}/{store.open_after(rater, 0) or 'done'}", 303)

    @app.get("/r/{token}/done")
    def done(token: str) -> HTMLResponse:
        _, rows = rows_of(token)
        left = [n for n, r in enumerate(rows, 1) if r["score"] == ""]
        return page(token=token, done=True, left=left, total=len(rows))

    @app.get("/r/{token}/{number}")
    def show(token: str, number: int) -> HTMLResponse:
        return text(token, number)

    @app.post("/r/{token}/{number}")
    def save(
        token: str, number: int, score: Annotated[str, Form()] = "", comment: Annotated[str, Form()] = ""
    ) -> Response:
        rater, rows = rows_of(token)
        if not 1 <= number <= len(rows):
            raise HTTPException(404, f"There is no text {number}, only 1 to {len(rows)}.")
        if score not in {str(s) for s in range(SCALE[0], SCALE[1] + 1)}:
            return text(token, number, f"Nothing was saved: choose a score from {SCALE[0]} to {SCALE[1]}.")
        if len(comment) > LONGEST:
            return text(token, number, f"Nothing was saved: the comment is longer than {LONGEST} characters.")
        store.save(rater, number, int(score), comment.strip())
        return RedirectResponse(f"/r/{token}/{store.open_after(rater, number) or 'done'}", 303)

    return app


def serve(study: str | Path, scores: str | Path, host: str, port: int, url: str | None = None) -> None:
    """Serve the page until stopped, after printing every rater's link.

    Args:
        scores: folder of the scores, kept over restarts.
        url: where raters reach the page, if not at host and port.
    """
    import uvicorn

    store = ScoreStore(study, scores)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        raise UserError(f"{host} port {port}: {e.strerror}: choose another --port or --host.") from e
    place = f"[{host}]" if ":" in host else host
    for token, rater in store.raters.items():
        print(f"{rater}: {(url or f'http://{place}:{listening.getsockname()[1]}').rstrip('/')}/r/{token}", flush=True)
    # No access log: it would hold the links.
    config = uvicorn.Config(application(store), log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
