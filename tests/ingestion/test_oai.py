"""Harvests against a server that speaks the real protocol on the loopback, faults included."""

import contextlib
import gzip
import json
import threading
from dataclasses import replace
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from feyntune.errors import UserError
from feyntune.ingestion.fields import CategoryFilter
from feyntune.ingestion.ingest import ingest
from feyntune.ingestion.oai import Harvest
from feyntune.ingestion.synthetic import synthetic_records
from feyntune.ingestion.tally import Tally
from tests.servers.oai import FAULTS, OaiServer, Record, from_kaggle
from tests.servers.plain_http import serving

RECORDS = list(synthetic_records(120, seed=11))


def server(**options):
    return OaiServer(from_kaggle(RECORDS), page=25, **options)


def harvest(folder, url, out="c", **options):
    return ingest(f"oai:{url}", folder / out, **{"delay": 0.0, "state": folder / "state"} | options)


def table(folder, out="c"):
    return pq.read_table(folder / out / "papers.parquet")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kaggle")
    (folder / "s.json").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    ingest(f"kaggle:{folder / 's.json'}", folder / "c")
    return table(folder).drop_columns("source").to_pylist()


@pytest.mark.parametrize("old_tokens", [False, True])
def test_a_harvest_gives_what_the_snapshot_gives(tmp_path, expected, old_tokens):
    with server(old_tokens=old_tokens).running() as s:
        harvest(tmp_path, s.url)
    assert table(tmp_path).drop_columns("source").to_pylist() == expected
    assert set(table(tmp_path)["source"].to_pylist()) == {"oai-arXivRaw"}


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("404", "stall")])
def test_a_fault_in_the_middle_changes_nothing(tmp_path, expected, fault):
    with server(faults={2: fault, 4: fault}).running() as s:
        harvest(tmp_path, s.url)
        assert len(s.requests) >= 6
    assert table(tmp_path).drop_columns("source").to_pylist() == expected


def test_a_page_that_does_not_come_in_time_is_asked_for_again(tmp_path):
    with server(faults={2: "stall"}, stall=1.0).running() as s:
        Harvest(s.url, tmp_path, delay=0.0, timeout=0.3).run()
        assert [r for r in s.requests if s.requests.count(r) > 1]
    assert len(list((tmp_path / "pages").iterdir())) >= 5


def test_retry_after_is_obeyed_and_requests_keep_their_distance(tmp_path):
    with server(faults={2: "503"}).running() as s:
        harvest(tmp_path, s.url, delay=0.2)
    gaps = [b - a for a, b in zip(s.times, s.times[1:], strict=False)]
    assert gaps[1] >= 1.0  # what the server asked for
    assert min(gaps) >= 0.2
    assert s.requests[1] == s.requests[2]  # the retry asks for the same page


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_a_harvest_that_dies_goes_on_where_it_was(tmp_path, expected, dies_at):
    with server(faults={dies_at: "404"}).running() as s:
        with pytest.raises(UserError, match="HTTP 404"):
            harvest(tmp_path, s.url)
        assert not (tmp_path / "c").exists()
        harvest(tmp_path, s.url)
        # the page it died at is asked for again, and no other of the list is
        asked = [tuple(sorted(r.items())) for r in s.requests]
        assert asked[dies_at - 1] == asked[dies_at]
        assert len(set(asked)) == len(asked) - 1
    assert table(tmp_path).drop_columns("source").to_pylist() == expected


def test_an_interrupted_and_a_smooth_harvest_have_one_digest(tmp_path):
    digests = set()
    for name, faults in (("smooth", {}), ("rough", {2: "503", 3: "cut", 4: "control"})):
        with server(faults=faults).running() as s:
            digests.add(harvest(tmp_path, s.url, out=name, state=tmp_path / f"{name}.state").digest)
    assert len(digests) == 1


def test_after_an_expired_token_the_list_goes_on_from_the_last_day_seen(tmp_path):
    with server(faults={3: "expired"}).running() as s:
        harvest(tmp_path, s.url)
    fourth = s.requests[3]
    seen = sorted(r.datestamp for r in s.records)[:50]
    assert fourth == {"verb": "ListRecords", "metadataPrefix": "arXivRaw", "from": seen[-1]}


def test_after_an_expired_token_an_unordered_list_is_begun_again(tmp_path):
    class Unordered(OaiServer):
        def answer(self, *args, **options):
            text = super().answer(*args, **options)
            return text.replace("<datestamp>20", "<datestamp>21", 1)  # the first record looks newest

    with Unordered(from_kaggle(RECORDS), page=25, faults={3: "expired"}).running() as s:
        harvest(tmp_path, s.url)
    assert "from" not in s.requests[3]
    assert table(tmp_path).num_rows == 120


def test_a_server_that_never_accepts_its_tokens_is_given_up(tmp_path):
    s = server(faults=dict.fromkeys(range(2, 40), "expired"))
    for record in s.records:
        record.datestamp = "2020-01-01"  # so that resuming from the last day makes no progress
    with s.running(), pytest.raises(UserError, match="resumptionTokens"):
        harvest(tmp_path, s.url)


def test_a_server_that_only_answers_html_is_given_up_and_nothing_is_lost(tmp_path):
    with server(faults=dict.fromkeys(range(3, 40), "html")).running() as s:
        with pytest.raises(UserError, match=r"no OAI-PMH.*login page"):
            harvest(tmp_path, s.url)
        assert len(s.requests) == 6
    assert len(list((tmp_path / "state" / "pages").iterdir())) == 2


def test_a_later_harvest_asks_only_for_what_changed(tmp_path):
    s = server()
    with s.running():
        harvest(tmp_path, s.url)
        before = len(s.requests)
        changed = dict(RECORDS[0], title="A corrected title", update_date="2026-02-01")
        added = dict(RECORDS[1], id="2602.00001", update_date="2026-02-02")
        s.records = [r for r in s.records if r.id != changed["id"]] + from_kaggle([changed, added])
        s.today = "2026-02-03"
        harvest(tmp_path, s.url, out="later")
        assert s.requests[before:] == [{"verb": "ListRecords", "metadataPrefix": "arXivRaw", "from": "2026-01-15"}]
    later = {p["id"]: p for p in table(tmp_path, "later").to_pylist()}
    assert len(later) == 121
    assert later[changed["id"]]["title"] == "A corrected title"


@pytest.mark.parametrize(("asked", "updated"), [(["hep-th"], False), (["gr-qc"], True), (None, True)])
def test_a_paper_moved_to_another_category_leaves_the_one_it_was_in(tmp_path, asked, updated):
    first = dict(RECORDS[0], categories="hep-th gr-qc")
    others = [dict(RECORDS[1], categories="hep-th"), dict(RECORDS[2], categories="gr-qc")]
    s = OaiServer(from_kaggle([first, *others]), page=25)
    with s.running():
        harvest(tmp_path, s.url, categories=asked)
        moved = dict(first, categories="gr-qc hep-th", title="As it is now", update_date="2026-02-01")
        s.records = [r for r in s.records if r.id != first["id"]] + from_kaggle([moved])
        s.today = "2026-02-03"
        harvest(tmp_path, s.url, out="later", categories=asked)
    titles = {p["id"]: p["title"] for p in table(tmp_path, "later").to_pylist()}
    assert titles.get(first["id"]) == ("As it is now" if updated else None)
    left_out = json.loads((tmp_path / "later" / "counts.json").read_text())["left_out"]
    assert left_out.get("other primary category", 0) == (0 if asked is None else 3 - len(titles))


def test_records_that_move_while_the_list_is_read_are_neither_lost_nor_doubled(tmp_path):
    s = server()
    first_day = sorted(s.records, key=lambda r: r.datestamp)[:20]

    def touch(number):
        if number == 3:  # records of the first page move to the end: the offset now skips twenty others' places
            for record in first_day:
                record.datestamp = "2026-01-15"

    s.before_request = touch
    with s.running():
        harvest(tmp_path, s.url)
        harvest(tmp_path, s.url, out="again")
    ids = table(tmp_path)["id"].to_pylist()
    assert len(ids) == len(set(ids))
    skipped = set(r["id"] for r in RECORDS) - set(ids)
    assert len(skipped) == 20  # what offset paging cannot give; nothing about them changed, so only a new list can
    with s.running():
        harvest(tmp_path, s.url, out="whole", state=tmp_path / "fresh")
    assert table(tmp_path, "whole").num_rows == 120


def test_a_record_touched_on_its_way_is_caught_by_the_request_that_follows(tmp_path):
    s = server()

    def touch(number):
        if number == 5:  # the last page has been asked for; now a new paper arrives
            s.records += from_kaggle([dict(RECORDS[0], id="2601.99999", update_date="2026-01-15")])

    s.before_request = touch
    s.page = 30
    with s.running():
        harvest(tmp_path, s.url)
    assert "2601.99999" in table(tmp_path)["id"].to_pylist()


def test_a_deleted_record_takes_its_paper_away(tmp_path):
    s = server()
    with s.running():
        harvest(tmp_path, s.url)
        gone = s.records[0]
        gone.deleted, gone.datestamp, s.today = True, "2026-02-01", "2026-02-01"
        harvest(tmp_path, s.url, out="later")
    assert gone.id in table(tmp_path)["id"].to_pylist()
    assert gone.id not in table(tmp_path, "later")["id"].to_pylist()
    assert json.loads((tmp_path / "later" / "counts.json").read_text())["left_out"]["deleted by the source"] == 1


def test_a_set_holds_cross_lists_and_categories_pick_the_primary(tmp_path):
    with server().running() as s:
        harvest(tmp_path, s.url, oai_set="physics:hep-th", categories=["hep-th"])
    in_set = [r for r in RECORDS if "hep-th" in r["categories"].split()]
    primary = [r for r in in_set if r["categories"].split()[0] == "hep-th"]
    assert 0 < len(primary) < len(in_set)
    assert table(tmp_path).num_rows == len(primary)
    assert json.loads((tmp_path / "c" / "counts.json").read_text())["read"] >= len(in_set)


def test_an_empty_answer_is_no_error_and_a_refusal_is(tmp_path):
    with server().running() as s:
        with pytest.raises(UserError, match="none of the 0 records"):
            harvest(tmp_path, s.url, oai_set="physics:nothing", state=tmp_path / "1")
        with pytest.raises(UserError, match=r"badArgument.*earliest"):
            harvest(tmp_path, s.url, since="2004-01-01", state=tmp_path / "2")
        s.records = [replace(r, metadata={"arXiv": r.metadata["arXiv"]}) for r in s.records]
        with pytest.raises(UserError, match="cannotDisseminateFormat"):
            harvest(tmp_path, s.url, state=tmp_path / "3")


def test_text_turned_into_unicode_is_refused_unless_asked_for(tmp_path):
    with server().running() as s:
        with pytest.raises(UserError, match="--converted-text"):
            harvest(tmp_path, s.url, prefix="arXiv")
        assert s.requests == []
        harvest(tmp_path, s.url, prefix="arXiv", converted_text=True)
    assert set(table(tmp_path)["source"].to_pylist()) == {"oai-arXiv"}


def test_a_folder_of_another_harvest_is_refused(tmp_path):
    with server().running() as s:
        harvest(tmp_path, s.url)
        with pytest.raises(UserError, match="holds a harvest of"):
            harvest(tmp_path, s.url, out="d", oai_set="cs")


def test_a_page_damaged_on_disk_is_named(tmp_path):
    with server().running() as s:
        run = Harvest(s.url, tmp_path, delay=0.0)
        run.run()
    page = tmp_path / "pages" / "000002.xml.zst"
    page.write_bytes(page.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"000002\.xml\.zst is damaged"):
        list(run.papers(CategoryFilter(None), Tally()))


def test_bad_records_are_counted_with_page_and_line_and_entities_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    bad = Record("2601.00001", "2026-01-01", [], {"arXivRaw": "<arXivRaw><id>2601.00001</id></arXivRaw>"})

    class Hostile(OaiServer):
        def answer(self, *args, **options):
            text = super().answer(*args, **options)
            doctype = f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>'
            return text.replace("?>\n", f"?>\n{doctype}\n", 1).replace("<title>", "<title>&e;", 1)

    with Hostile([*from_kaggle(RECORDS[:5]), bad]).running() as s:
        harvest(tmp_path, s.url, max_bad=0.5)
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())
    assert counts["refused"]["no categories"]["examples"][0].startswith("000001.xml.zst:")
    assert "oai:arXiv.org:2601.00001" in counts["refused"]["no categories"]["examples"][0]
    assert not any("secret" in t for t in table(tmp_path)["title"].to_pylist())


def test_withdrawn_is_read_from_the_last_version(tmp_path):
    withdrawn = from_kaggle([dict(RECORDS[0], comments=None)])[0]
    withdrawn.metadata["arXivRaw"] = withdrawn.metadata["arXivRaw"].replace(
        "</size>", "</size><source_type>DI</source_type>"
    )
    with OaiServer([withdrawn]).running() as s:
        harvest(tmp_path, s.url)
    assert table(tmp_path)["withdrawn"].to_pylist() == [True]


def test_since_is_asked_for(tmp_path):
    with server().running() as s:
        Harvest(s.url, tmp_path, delay=0.0, since=date(2020, 5, 1)).run()
    assert s.requests[0]["from"] == "2020-05-01"


@contextlib.contextmanager
def answering(*answers):
    """An HTTP server that gives these (status, headers, body) in turn, then the last; yields address, paths."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[min(len(paths), len(answers) - 1)]
            paths.append(self.path)
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", paths
    finally:
        http.shutdown()
        http.server_close()


NOTHING = (
    b"<OAI-PMH xmlns='http://www.openarchives.org/OAI/2.0/'><responseDate>2026-11-01T00:00:00Z</responseDate>"
    b"<error code='noRecordsMatch'>none</error></OAI-PMH>"
)


def test_a_harvest_goes_through_the_proxy_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering((200, {"content-type": "text/xml"}, NOTHING)) as (proxy, paths):
        monkeypatch.setenv("http_proxy", proxy)
        Harvest("http://oaipmh.case.invalid/oai", tmp_path / "h", delay=0).run()
    assert paths[0].startswith("http://oaipmh.case.invalid/oai?verb=ListRecords")


def test_a_login_page_that_a_redirect_leads_to_is_recognized(tmp_path):
    login = (200, {"content-type": "text/html"}, b"<!DOCTYPE html><title>Sign in</title>")
    redirect = (302, {"location": "/login"}, b"")
    with answering(redirect, login, redirect, login) as (url, paths), pytest.raises(UserError, match="login page"):
        Harvest(f"{url}/oai", tmp_path / "h", delay=0).run()
    assert paths[1] == "/login"


def test_a_page_that_unpacks_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("feyntune.ingestion.oai._PAGE_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(4 << 20))
    with answering((200, {"content-encoding": "gzip"}, bomb)) as (url, _), pytest.raises(UserError, match="1 MiB"):
        Harvest(f"{url}/oai", tmp_path / "h", delay=0).run()


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"])
def test_link_local_hosts_are_refused(tmp_path, host):
    with pytest.raises(UserError, match="link-local"):
        Harvest(f"http://{host}/latest/meta-data", tmp_path / "h", delay=0).run()


def test_a_redirect_to_a_link_local_host_is_refused(tmp_path):
    away = (302, {"location": "http://169.254.169.254/"}, b"")
    with answering(away) as (url, paths), pytest.raises(UserError, match="link-local"):
        Harvest(f"{url}/oai", tmp_path / "h", delay=0).run()
    assert len(paths) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///oai", "is not a web address"),
        ("http://a b/oai", "is not a web address"),
        ("http://h:99999/oai", "is not a web address"),
        ("http://::1:9/oai", "is not a web address"),
        ("http://user:secret-of-a-test@h/oai", "holds a user or a password"),
        ("http://h/oai?verb=Identify", r"up to the \?"),
    ],
)
def test_an_address_that_cannot_be_harvested_makes_nothing(tmp_path, url, message):
    with pytest.raises(UserError, match=message) as refused:
        ingest(f"oai:{url}", tmp_path / "c")
    assert "secret-of-a-test" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["ftp://h/x", "http://[bad", "http://user:p@h/x"])
def test_a_redirect_to_no_web_address_is_one_sentence(tmp_path, location):
    redirect = lambda method, path: (302, {"location": location}, b"")
    with serving(redirect) as server, pytest.raises(UserError, match=r"redirects to .*, no web address"):
        ingest(f"oai:{server.url}/oai", tmp_path / "c", delay=0.01)


def test_a_proxy_that_wants_a_password_is_named(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(lambda method, path: (407, {"content-type": "text/html"}, b"<html>")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with pytest.raises(UserError, match="wants a user and a password"):
            ingest("oai:http://oai.case.invalid/oai", tmp_path / "c", delay=0.01)
