"""An OAI-PMH 2.0 server over a file of records, which can be told to misbehave.

    python -m tests.servers.oai FILE.xml|FILE.jsonl [--port P] [--page N] [--old-tokens] [--faults PLAN]

FILE.xml is a ListRecords answer whose records are served as they are, in their format; FILE.jsonl is in the
Kaggle format and is served as arXivRaw and as arXiv. PLAN is a list such as `2:503,3:truncated`: what happens
to the second and third request (see FAULTS).
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from lxml import etree
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

OAI = "http://www.openarchives.org/OAI/2.0/"
ARCHIVE_OF_GROUP = {"hep-th", "hep-ph", "gr-qc", "astro-ph", "quant-ph", "math-ph", "cond-mat", "physics", "nlin"}
FAULTS = (
    "503",  # too busy, with Retry-After
    "429",
    "500",
    "truncated",  # the connection ends in the middle of the body
    "cut",  # half a page, with the right Content-Length
    "html",  # an HTML error page with HTTP 200
    "control",  # a control character in the middle, which XML forbids
    "stall",  # no answer for longer than a short time-out
    "expired",  # badResumptionToken
    "404",
)


@dataclass
class Record:
    id: str
    datestamp: str
    sets: list[str]
    metadata: dict[str, str]  # XML by metadata prefix
    deleted: bool = False


@dataclass
class OaiServer:
    """The protocol over `records`; a WSGI application. `faults` maps the number of a request to one of FAULTS."""

    records: list[Record]
    page: int = 100
    old_tokens: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    stall: float = 3.0
    today: str = "2026-01-15"
    before_request: Any = None  # called with the number of each request, before it is answered
    requests: list[dict[str, str]] = field(default_factory=list)  # what was asked
    times: list[float] = field(default_factory=list)
    url: str = ""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        arguments = {**request.args, **request.form}
        self.requests.append(arguments)
        self.times.append(time.monotonic())
        number = len(self.requests)
        if self.before_request:
            self.before_request(number)
        fault = self.faults.get(number)
        if fault in ("503", "429", "500", "404"):
            headers = {"Retry-After": "1"} if fault in ("503", "429") else {}
            return Response("busy", int(fault), headers)(environ, start_response)
        if fault == "stall":
            time.sleep(self.stall)
        if fault == "html":
            return Response("<html><body>Down for maintenance", mimetype="text/html")(environ, start_response)
        repeated = any(len(values) > 1 for _, values in request.args.lists())
        body = self.answer(arguments, expired=fault == "expired", repeated=repeated).encode()
        if fault == "control":
            body = body.replace(b"<title>", b"<title>\x0c\x01", 1)
        if fault == "cut":
            body = body[: len(body) // 2]
        response = Response(body, mimetype="text/xml")
        if fault == "truncated":
            response = Response(body[: len(body) // 2], mimetype="text/xml", headers={"Content-Length": str(len(body))})
            response.automatically_set_content_length = False
        return response(environ, start_response)

    def answer(self, arguments: dict[str, str], expired: bool, repeated: bool) -> str:
        verb = arguments.get("verb", "")
        verbs = {
            "Identify": self._identify,
            "ListMetadataFormats": self._formats,
            "ListSets": self._sets,
            "ListRecords": self._list,
            "ListIdentifiers": self._list,
            "GetRecord": self._get_record,
        }
        if verb not in verbs or repeated:
            code = "badArgument" if verb in verbs else "badVerb"
            content = f'<error code="{code}">illegal argument</error>'
        elif expired and "resumptionToken" in arguments:
            content = '<error code="badResumptionToken">the token has expired</error>'
        else:
            content = verbs[verb](arguments)
        return (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<OAI-PMH xmlns="{OAI}">\n'
            f"<responseDate>{self.today}T12:00:00Z</responseDate>\n"
            f'<request verb="{verb}">{self.url}</request>\n{content}\n</OAI-PMH>\n'
        )

    def prefixes(self) -> list[str]:
        return sorted({prefix for record in self.records for prefix in record.metadata})

    def _identify(self, _: dict[str, str]) -> str:
        return (
            f"<Identify><repositoryName>test</repositoryName><baseURL>{self.url}</baseURL>"
            "<protocolVersion>2.0</protocolVersion><earliestDatestamp>2005-09-16</earliestDatestamp>"
            "<deletedRecord>persistent</deletedRecord><granularity>YYYY-MM-DD</granularity></Identify>"
        )

    def _formats(self, _: dict[str, str]) -> str:
        formats = "".join(
            f"<metadataFormat><metadataPrefix>{p}</metadataPrefix></metadataFormat>" for p in self.prefixes()
        )
        return f"<ListMetadataFormats>{formats}</ListMetadataFormats>"

    def _sets(self, _: dict[str, str]) -> str:
        specs = sorted({s for record in self.records for s in record.sets})
        return "<ListSets>" + "".join(f"<set><setSpec>{s}</setSpec></set>" for s in specs) + "</ListSets>"

    def _list(self, arguments: dict[str, str]) -> str:
        if "resumptionToken" in arguments:
            if len(arguments) != 2:
                return '<error code="badArgument">resumptionToken is an exclusive argument</error>'
            query = parse_qs(arguments["resumptionToken"].replace("|", "&"), keep_blank_values=True)
            asked = {k: v[0] for k, v in query.items()}
            if "skip" not in asked:
                return '<error code="badResumptionToken">not a token</error>'
        else:
            asked = {k: v for k, v in arguments.items() if k in ("metadataPrefix", "set", "from", "until")}
        if set(arguments) - {"verb", "metadataPrefix", "set", "from", "until", "resumptionToken"}:
            return '<error code="badArgument">illegal argument</error>'
        if "metadataPrefix" not in asked:
            return '<error code="badArgument">metadataPrefix is required</error>'
        if asked["metadataPrefix"] not in self.prefixes():
            return '<error code="cannotDisseminateFormat">no such format</error>'
        if asked.get("from", "9999") < "2005-09-16":
            return '<error code="badArgument">from is before earliestDatestamp</error>'
        chosen = [
            r
            for r in sorted(self.records, key=lambda r: r.datestamp)  # offset paging over whatever is there now
            if asked.get("from", "") <= r.datestamp <= asked.get("until", "9999")
            and ("set" not in asked or any(s == asked["set"] or s.startswith(asked["set"] + ":") for s in r.sets))
        ]
        skip = int(asked.get("skip", 0))
        part = chosen[skip : skip + self.page]
        if not part:
            return '<error code="noRecordsMatch">nothing matches</error>'
        if arguments["verb"] == "ListIdentifiers":
            shown = "".join(_header(r) for r in part)
        else:
            shown = "".join(_record(r, asked["metadataPrefix"]) for r in part)
        token = ""
        following = urlencode({**asked, "skip": skip + self.page})
        if self.old_tokens and skip + self.page < len(chosen):
            token = following.replace("&", "|")
            token = f'<resumptionToken cursor="{skip}" completeListSize="{len(chosen)}">{_xml(token)}</resumptionToken>'
        elif skip + self.page < len(chosen):
            token = f"<resumptionToken>{_xml(following)}</resumptionToken>"
        elif skip:
            token = "<resumptionToken/>"
        return f"<{arguments['verb']}>{shown}{token}</{arguments['verb']}>"

    def _get_record(self, arguments: dict[str, str]) -> str:
        for record in self.records:
            if arguments.get("identifier") == f"oai:arXiv.org:{record.id}":
                if arguments.get("metadataPrefix") not in record.metadata:
                    return '<error code="cannotDisseminateFormat">no such format</error>'
                return f"<GetRecord>{_record(record, arguments['metadataPrefix'])}</GetRecord>"
        return '<error code="idDoesNotExist">no such record</error>'

    @contextmanager
    def running(self, port: int = 0) -> Iterator["OaiServer"]:
        """Serve on the loopback while the block runs; `url` says where."""
        server = make_server("127.0.0.1", port, self, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{server.server_port}/oai"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def from_kaggle(records: list[dict[str, Any]]) -> list[Record]:
    """Records in the Kaggle format as the server's records, in the formats arXivRaw and arXiv."""
    return [
        Record(
            r["id"],
            max(r["update_date"], "2005-09-16"),
            _set_specs(r["categories"]),
            {"arXivRaw": raw(r), "arXiv": cooked(r)},
        )
        for r in records
    ]


def raw(record: dict[str, Any]) -> str:
    """A Kaggle record as arXivRaw prints it (`%d` pads the day with a zero)."""
    versions = ""
    for v in record["versions"]:
        weekday, day, rest = v["created"].split(" ", 2)
        versions += (
            f'<version version="{v["version"]}"><date>{weekday} {int(day):02d} {rest}</date><size>9kb</size></version>'
        )
    fields = "".join(
        f"<{key}>{_xml(record[key])}</{key}>"
        for key in ("title", "authors", "categories", "comments", "license", "abstract")
        if record.get(key)
    )
    return f'<arXivRaw xmlns="http://arxiv.org/OAI/arXivRaw/"><id>{record["id"]}</id>{versions}{fields}</arXivRaw>'


def cooked(record: dict[str, Any]) -> str:
    """A Kaggle record in the format arXiv, in which some TeX is Unicode and `created` is the last version's."""
    fields = "".join(
        f"<{key}>{_xml(record[key].replace(chr(92) + 'alpha', 'α'))}</{key}>"
        for key in ("title", "categories", "comments", "license", "abstract")
        if record.get(key)
    )
    return (
        f'<arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>{record["id"]}</id>'
        f"<created>{record['update_date']}</created>{fields}</arXiv>"
    )


def from_xml(path: Path) -> list[Record]:
    """The records of a saved ListRecords answer."""
    records = []
    for element in etree.parse(str(path)).getroot().iterfind("{*}ListRecords/{*}record"):
        header = element.find("{*}header")
        metadata = element.find("{*}metadata/{*}*")
        records.append(
            Record(
                header.findtext("{*}identifier").rpartition(":")[2],
                header.findtext("{*}datestamp"),
                [s.text for s in header.iterfind("{*}setSpec")],
                {etree.QName(metadata).localname: etree.tostring(metadata, encoding="unicode")},
            )
        )
    return records


def _set_specs(categories: str) -> list[str]:
    specs = []
    for category in categories.split():
        archive = category.partition(".")[0]
        group = "physics" if archive in ARCHIVE_OF_GROUP else archive
        specs.append(f"{group}:{archive}" + (f":{category.partition('.')[2]}" if "." in category else ""))
    return specs


def _header(record: Record) -> str:
    status = ' status="deleted"' if record.deleted else ""
    sets = "".join(f"<setSpec>{s}</setSpec>" for s in record.sets)
    return (
        f"<header{status}><identifier>oai:arXiv.org:{record.id}</identifier>"
        f"<datestamp>{record.datestamp}</datestamp>{sets}</header>"
    )


def _record(record: Record, prefix: str) -> str:
    metadata = "" if record.deleted else f"<metadata>{record.metadata[prefix]}</metadata>"
    return f"<record>{_header(record)}{metadata}</record>\n"


def _xml(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--page", type=int, default=100)
    parser.add_argument("--old-tokens", action="store_true", help="tokens with cursor and completeListSize")
    parser.add_argument("--faults", default="", help="such as 2:503,3:truncated; " + ", ".join(FAULTS))
    args = parser.parse_args()
    if args.file.suffix == ".xml":
        records = from_xml(args.file)
    else:
        records = from_kaggle([json.loads(line) for line in args.file.read_text().splitlines()])
    faults = {int(n): what for n, what in (part.split(":") for part in args.faults.split(",") if part)}
    server = OaiServer(records, page=args.page, old_tokens=args.old_tokens, faults=faults)
    with server.running(args.port):
        print(f"{len(records)} records in the formats {', '.join(server.prefixes())} at {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
