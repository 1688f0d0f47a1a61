"""Harvesting over OAI-PMH 2.0: pages are kept as they came, and read into papers afterwards.

A harvest lives in a folder: `pages/000001.xml.zst, ...` and `harvest.json`, which is replaced after each page
and says what to ask for next. So a harvest that dies resumes with the page it was at, and a later one asks
only for what changed since.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

import urllib3
import zstandard
from lxml import etree

from feyntune.artifacts.records import SOURCES, Paper
from feyntune.errors import UserError
from feyntune.ingestion.fields import BadRecord, CategoryFilter, Row, make_paper, parse_id
from feyntune.ingestion.tally import DELETED, OTHER_CATEGORY, Tally
from feyntune.network import checked_address, describe_failure, http_pool, proxy_for, refuse_link_local, shown
from feyntune.telemetry import log, progress

_PAGE_BYTES = 256 << 20  # unpacked; arXiv's pages have 1 to 3 MiB
_REDIRECTS = 5
_TRIES = 4  # of a page that does not arrive whole
_RESTARTS = 3  # with an expired token, without getting further


class Harvest:
    """A harvest of `url`, kept in the folder `state`.

    Raises:
        UserError: a format whose text is not the author's TeX, unless `converted_text`; or `state` holds a
            harvest of something else.
    """

    def __init__(
        self,
        url: str,
        state: str | Path,
        *,
        prefix: str = "arXivRaw",
        converted_text: bool = False,
        oai_set: str | None = None,
        since: date | None = None,
        delay: float = 3.0,
        timeout: float = 120.0,
    ):
        checked_address(url, "oai:https://oaipmh.arxiv.org/oai")
        if "?" in url or "#" in url:
            raise UserError(f"oai:{url}: give the address up to the ?, what follows is added here.")
        if f"oai-{prefix}" not in SOURCES:
            raise UserError(f"OAI prefix {prefix!r} has no category codes or dates of version 1: use arXivRaw.")
        if not SOURCES[f"oai-{prefix}"] and not converted_text:
            raise UserError(
                f"OAI prefix {prefix!r}: arXiv's server turns TeX into Unicode in this format ($\\alpha$ becomes α), "
                "which must not be mixed with TeX or compared with it; use arXivRaw, or accept it for a corpus "
                "of its own with --converted-text."
            )
        self.url, self.delay, self.source = url, delay, f"oai-{prefix}"
        self.folder = Path(state)
        self.pages = self.folder / "pages"
        self.pages.mkdir(parents=True, exist_ok=True)
        request = {"url": url, "prefix": prefix, "set": oai_set, "since": since.isoformat() if since else None}
        self.request = request
        self.state = self._load(request)
        self.http = http_pool(
            url,
            num_pools=1,
            maxsize=1,
            retries=_PatientRetry(
                total=8,
                status_forcelist=(429, 500, 502, 503, 504),
                allowed_methods=("GET",),
                backoff_factor=max(delay, 0.01),
                delay=delay,
            ),
            timeout=urllib3.Timeout(connect=min(timeout, 30), read=timeout),
            headers={"User-Agent": "feyntune (OAI-PMH harvester)", "Accept-Encoding": "gzip"},
        )
        self.last_request = -float("inf")

    def run(self) -> None:
        """Fetch what is missing: the rest of a harvest that was cut off, or what changed since the last.

        A list that takes several pages can miss a record that changes while it is read; so one such is followed
        by a request for what changed since it was begun.

        Raises:
            UserError: the server cannot be reached, refuses, or answers with something else than OAI-PMH. What
                was fetched stays in the folder, and the next run resumes from it.
        """
        with progress("harvest", None, "pages") as bar:
            if self.state["pass"] is None:
                self._begin(self.state["next_from"])
            while self.state["pass"] is not None:
                pages_before = self.state["pages"]
                first_page = self.state["pass"]["pages"] == 0
                self._step()
                bar.advance(self.state["pages"] - pages_before)
                if self.state["pass"] is None and not first_page and not self.state["catching_up"]:
                    self.state["catching_up"] = True
                    self._begin(self.state["next_from"])
            self.state["catching_up"] = False
            self._save()

    def papers(self, categories: CategoryFilter, tally: Tally) -> Iterator[Row]:
        """The papers of all pages, in the order they were fetched; the same paper can come more than once."""
        for number in range(1, self.state["pages"] + 1):
            page = self.pages / f"{number:06d}.xml.zst"
            try:
                root = _parse(zstandard.ZstdDecompressor().decompressobj().decompress(page.read_bytes()))
            except (OSError, zstandard.ZstdError, _Malformed) as e:
                raise UserError(f"{page} is damaged ({e}): delete {self.folder} and harvest again.") from e
            for record in root.iterfind("{*}ListRecords/{*}record"):
                tally.read += 1
                try:
                    row = _row(record, self.source)
                except BadRecord as e:
                    identifier = record.findtext("{*}header/{*}identifier", "")
                    tally.bad(f"{page.name}:{record.sourceline} {identifier}".strip(), str(e))
                    continue
                if not row.left_out and not categories.accepts(row.paper.primary):
                    # Passed on all the same: the paper may have been in a category asked for before.
                    tally.other(row.paper.primary, 0)
                    row = row._replace(left_out=OTHER_CATEGORY)
                yield row

    # --- one pass over a list of records ---

    def _begin(self, since: str | None) -> None:
        """Start a pass over everything changed on the day `since` or later."""
        self.state["pass"] = {
            "from": since,
            "token": None,
            "pages": 0,
            "started": None,  # the server's date when it answered first
            "newest": None,  # the latest datestamp seen
            "in_order": True,  # datestamps have not gone back so far, so a restart may begin at the newest
            "restarts": 0,
        }

    def _step(self) -> None:
        """Fetch one page of the pass and remember it."""
        current = self.state["pass"]
        if current["token"]:
            arguments = {"verb": "ListRecords", "resumptionToken": current["token"]}
        else:
            arguments = {"verb": "ListRecords", "metadataPrefix": self.request["prefix"]}
            if self.request["set"]:
                arguments["set"] = self.request["set"]
            if current["from"]:
                arguments["from"] = current["from"]
        body, root = self._get(arguments)
        errors = {e.get("code"): (e.text or "").strip() for e in root.iterfind("{*}error")}
        if "badResumptionToken" in errors and current["token"]:
            self._restart(errors["badResumptionToken"])
            return
        if errors and set(errors) != {"noRecordsMatch"}:
            reason = "; ".join(f"{code}: {text}" for code, text in errors.items())
            raise UserError(f"{self.url} refused {arguments} ({reason}): change the set, the prefix or the dates.")
        current["started"] = current["started"] or root.findtext("{*}responseDate", "")[:10] or None
        if not errors:
            stamps = [e.text or "" for e in root.iterfind("{*}ListRecords/{*}record/{*}header/{*}datestamp")]
            seen = [current["newest"] or "", *(s[:10] for s in stamps)]
            current["in_order"] = current["in_order"] and seen == sorted(seen)
            if max(seen) > (current["newest"] or ""):
                current["restarts"] = 0
            current["newest"] = max(seen)
            current["pages"] += 1
            self._keep(body)
        token = (root.findtext("{*}ListRecords/{*}resumptionToken") or "").strip()
        if token and token == current["token"]:
            raise UserError(f"{self.url} gave the same resumptionToken twice and never ends: report it to them.")
        current["token"] = token or None
        if not token:
            self.state["next_from"] = current["started"] or self.state["next_from"]
            self.state["pass"] = None
        self._save()

    def _restart(self, reason: str) -> None:
        """Ask for the list again, without its expired token, from the last day seen.

        The token's offset means nothing in a new list. Where the days of this list did not come in order, the
        last one seen says nothing about what is missing, so the pass begins again; repeats do no harm.
        """
        current = self.state["pass"]
        current["restarts"] += 1
        if current["restarts"] > _RESTARTS:
            raise UserError(f"{self.url} does not accept its own resumptionTokens ({reason}): try again later.")
        if current["in_order"] and current["newest"]:
            current["from"] = current["newest"]
        current["token"] = None
        log.info("the resumptionToken has expired (%s): resuming from %s", reason, current["from"] or "the beginning")
        self._save()

    def _get(self, arguments: dict[str, str]) -> tuple[bytes, Any]:
        """One answer, asked for again when it arrives broken; not sooner than `delay` after the last."""
        problem = ""
        for _ in range(_TRIES):
            time.sleep(max(0.0, self.last_request + self.delay - time.monotonic()))
            try:
                body = self._fetch(f"{self.url}?{urlencode(arguments)}")
                return body, _parse(body)
            except urllib3.exceptions.MaxRetryError as e:
                cause = describe_failure(e, self.url)
                raise UserError(f"{self.url} cannot be harvested now ({cause}): run again later to resume.") from e
            except (_Malformed, urllib3.exceptions.HTTPError) as e:
                problem = str(e)
                log.warning("%s answered with a page that cannot be read (%s): asking again", self.url, problem)
            finally:
                self.last_request = time.monotonic()
        raise UserError(f"{self.url} answered {_TRIES} times with no OAI-PMH ({problem}): run again later to resume.")

    def _fetch(self, url: str) -> bytes:
        """The body of a page, unpacked, up to _PAGE_BYTES; redirects are followed."""
        for _ in range(_REDIRECTS):
            refuse_link_local(url)
            with contextlib.closing(self.http.request("GET", url, redirect=False, preload_content=False)) as answer:
                location = answer.headers.get("location")
                if answer.status in (301, 302, 303, 307, 308) and location:
                    url = _followed(url, location)
                    continue
                if answer.status == 407:
                    raise UserError(
                        f"The proxy {shown(proxy_for(url))} wants a user and a password: set "
                        "https_proxy=http://USER:PASSWORD@HOST:PORT."
                    )
                if answer.status != 200:
                    raise UserError(f"{self.url} answered HTTP {answer.status} {answer.reason}: check the address.")
                body = bytearray()
                while part := answer.read(1 << 16):
                    body += part
                    if len(body) > _PAGE_BYTES:
                        raise UserError(
                            f"{self.url} sent a page of more than {_PAGE_BYTES >> 20} MiB: report it to them."
                        )
                return bytes(body)
        raise UserError(f"{self.url} redirects again and again: check the address.")

    # --- the folder ---

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        file = self.folder / "harvest.json"
        if not file.exists():
            fresh = {"asked": request, "pages": 0, "next_from": request["since"], "catching_up": False, "pass": None}
            return fresh
        memory = json.loads(file.read_text(encoding="utf-8"))
        if memory["asked"] != request:
            raise UserError(
                f"{self.folder} holds a harvest of {memory['asked']}, not of {request}: give another --state."
            )
        return memory

    def _keep(self, body: bytes) -> None:
        """Put the page where `harvest.json` will count it; until then it may be overwritten."""
        page = self.pages / f"{self.state['pages'] + 1:06d}.xml.zst"
        _write(page, zstandard.ZstdCompressor(level=6).compress(body))
        self.state["pages"] += 1

    def _save(self) -> None:
        _write(self.folder / "harvest.json", json.dumps(self.state, indent=1).encode())


def _followed(url: str, location: str) -> str:
    try:
        return checked_address(urljoin(url, location), url)
    except (UserError, ValueError):
        raise UserError(f"{url.partition('?')[0]} redirects to {location[:100]!r}, no web address: check it.") from None


class _PatientRetry(urllib3.Retry):
    """urllib3's retries, never sooner than `delay` seconds after the failure."""

    def __init__(self, *args: Any, delay: float, **options: Any):
        super().__init__(*args, **options)
        self.delay = delay

    def new(self, **options: Any) -> "_PatientRetry":
        return super().new(delay=self.delay, **options)

    def get_backoff_time(self) -> float:
        return max(self.delay, super().get_backoff_time())

    def get_retry_after(self, response: Any) -> float | None:
        wait = super().get_retry_after(response)
        return wait if wait is None else max(self.delay, wait)


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


class _Malformed(Exception):
    """Not a whole OAI-PMH answer."""


_NOT_XML = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # control characters that a page may hold and XML may not


_HTML = re.compile(rb"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_PAGE = "a web page, such as the login page of a network or a proxy: open the address in a browser"


def _parse(body: bytes) -> Any:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(_NOT_XML.sub(b"", body), parser)
    except etree.XMLSyntaxError as e:
        raise _Malformed(_PAGE if _HTML.match(body) else f"malformed XML: {e}") from None
    if _HTML.match(body):
        raise _Malformed(_PAGE)
    if etree.QName(root).localname != "OAI-PMH":
        raise _Malformed(f"a page of <{etree.QName(root).localname}>")
    return root


def _row(record: Any, source: str) -> Row:
    """A `<record>` in the format arXivRaw or arXiv."""
    header = record.find("{*}header")
    if header is None:
        raise BadRecord("no header")
    updated = header.findtext("{*}datestamp", "")
    if header.get("status") == "deleted":
        return Row(_gone(header.findtext("{*}identifier", ""), source), updated, DELETED)
    fields = record.find("{*}metadata/{*}*")
    if fields is None:
        raise BadRecord("no metadata")
    if etree.QName(fields).localname not in ("arXiv", "arXivRaw"):
        raise BadRecord(f"metadata in the format {etree.QName(fields).localname}")
    text = lambda name: fields.findtext(f"{{*}}{name}")
    versions = fields.findall("{*}version")
    if versions:
        first = [v.findtext("{*}date") for v in versions if v.get("version") == "v1"]
        submitted = first[0] if first else None
        withdrawn = "I" in (versions[-1].findtext("{*}source_type") or "")
    else:
        submitted, withdrawn = text("created"), False
    paper = make_paper(
        source=source,
        id=text("id"),
        categories=text("categories"),
        title=text("title"),
        abstract=text("abstract"),
        submitted=submitted,
        comments=text("comments"),
        license=text("license"),
        withdrawn=withdrawn,
    )
    return Row(paper, updated)


def _gone(identifier: str, source: str) -> Paper:
    return Paper(parse_id(identifier.rpartition(":")[2]), "", [], "", "", date.min, None, True, source)
