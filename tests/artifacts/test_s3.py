"""S3 as its users set it up: keys from every usual place, proxies, private CAs, and refusals that say what to do."""

import datetime
import json
import logging
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from feyntune.artifacts.names import StoreError
from feyntune.artifacts.store import creates_atomically, open_store
from feyntune.errors import UserError
from feyntune.kubeflow.chart_jobs import bucket
from feyntune.network import proxy_for
from feyntune.settings import S3Settings

SECRET = "hush-hush-secret"
NAMES = (
    *(
        "S3_ENDPOINT",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_STS",
        "S3_CA_BUNDLE",
        "AWS_CA_BUNDLE",
    ),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "S3_ADDRESSING_STYLE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "SSL_CERT_FILE"),
)


@pytest.fixture(autouse=True)
def env(monkeypatch, tmp_path) -> Callable[..., None]:
    """An environment without any of the names above; call it to set some."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@dataclass
class Server:
    url: str
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers


def not_found(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    return 404, {"content-type": "application/xml"}, b"<Error><Code>NoSuchKey</Code><Message>m</Message></Error>"


@contextmanager
def serving(answer=not_found, certificate: tuple[Path, Path] | None = None) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            server.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    server = Server(f"http{'s' if certificate else ''}://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


# --- settings ---


@pytest.mark.parametrize("name", ["S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_every_usual_name_of_the_endpoint_is_read(env, name):
    env(**{name: " https://minio.example:9000/\n"}, AWS_ACCESS_KEY_ID=" a\n", AWS_SECRET_ACCESS_KEY="b ")
    settings = S3Settings.from_env()
    assert (settings.host, settings.secure) == ("minio.example:9000", True)
    assert settings.access_key.get_secret_value() == "a"
    assert settings.secret_key.get_secret_value() == "b"


def test_our_own_name_comes_first_and_the_region_has_both_names(env):
    env(S3_ENDPOINT="http://ours:1", AWS_ENDPOINT_URL="http://theirs:2", AWS_REGION="eu-central-1")
    assert S3Settings.from_env().host == "ours:1"
    assert S3Settings.from_env().region == "eu-central-1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"S3_ENDPOINT": "http://h:1/minio"}, "has the path '/minio'"),
        ({"S3_ENDPOINT": "minio.example:9000"}, "not a URL"),
        ({"S3_ENDPOINT": "http://h:port"}, "not a URL"),
        ({"S3_ENDPOINT": f"http://user:{SECRET}@h:1"}, "holds a user or a key"),
        ({"S3_ENDPOINT": f"ftp://user:{SECRET}@h:1"}, "not a URL"),
        ({"S3_ENDPOINT": "http://h:1", "AWS_SECRET_ACCESS_KEY": ""}, "needs AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "minioadmin"}, "no S3_ENDPOINT is set"),
        ({"S3_ENDPOINT": "http://h:1", "S3_CA_BUNDLE": "/no/such.pem"}, "S3_CA_BUNDLE is /no/such.pem"),
        ({"S3_ENDPOINT": "http://h:1", "S3_ADDRESSING_STYLE": "dns"}, "use auto, path or virtual"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence_without_keys(env, values, message):
    env(**{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": SECRET, **values})
    with pytest.raises(UserError, match=message) as e:
        S3Settings.from_env()
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("region", ["nowhere in particular", "eu west"])
def test_an_impossible_region_is_one_sentence(env, region):
    env(S3_ENDPOINT="http://h:1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_REGION=region)
    with pytest.raises(UserError, match="cannot be used"):
        open_store("s3://bucket")


# --- where keys come from ---


def test_temporary_keys_send_their_token_with_every_request(env):
    with serving() as server:
        env(S3_ENDPOINT=server.url, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_SESSION_TOKEN=" t \n")
        store = open_store("s3://bucket/x")
        assert not store.exists("a")
    assert [h["x-amz-security-token"] for _, _, h in server.requests] == ["t"]


def test_keys_of_a_profile_are_read(env, tmp_path):
    (tmp_path / "keys").write_text("[lab]\naws_access_key_id = of-the-profile\naws_secret_access_key = s\n")
    with serving() as server:
        env(S3_ENDPOINT=server.url, AWS_PROFILE="lab", AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "keys"))
        assert not open_store("s3://bucket").exists("a")
        assert "Credential=of-the-profile/" in server.requests[0][2]["authorization"]
        env(AWS_PROFILE="other")
        with pytest.raises(UserError, match="profile other in"):
            open_store("s3://bucket")


def _sts(expires_in: float, keys: Iterator[str]):
    def answer(method: str, path: str):
        if "AssumeRoleWithWebIdentity" not in path:
            return not_found(method, path)
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=expires_in)
        body = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            f"<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{next(keys)}</AccessKeyId>"
            f"<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{until:%Y-%m-%dT%H:%M:%SZ}"
            "</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        return 200, {"content-type": "text/xml"}, body.encode()

    return answer


def test_a_web_identity_is_exchanged_at_the_private_server_and_again_before_it_expires(env, tmp_path):
    (tmp_path / "jwt").write_text("jwt-of-the-pod")
    with serving(_sts(5, iter(f"key{i}" for i in range(9)))) as server:
        env(S3_ENDPOINT=server.url, AWS_WEB_IDENTITY_TOKEN_FILE=str(tmp_path / "jwt"), AWS_ROLE_ARN="arn:r")
        store = open_store("s3://bucket")
        assert not store.exists("a")
        assert not store.exists("b")
    used = [
        h["authorization"].split("Credential=")[1].split("/")[0] for _, _, h in server.requests if "authorization" in h
    ]
    assert used == sorted(set(used))  # another key each time: five seconds are too few to use one again
    assert len(used) == 2


def test_a_web_identity_that_is_refused_is_one_sentence_without_its_token(env, tmp_path, caplog):
    (tmp_path / "jwt").write_text("jwt-of-the-pod")
    with serving(lambda m, p: (403, {}, b"")) as server, caplog.at_level(logging.DEBUG):
        env(S3_ENDPOINT=server.url, AWS_WEB_IDENTITY_TOKEN_FILE=str(tmp_path / "jwt"), AWS_ROLE_ARN="arn:r")
        with pytest.raises(UserError, match="the web identity") as e:
            open_store("s3://bucket")
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    assert "jwt-of-the-pod" not in str(e.value) + str(warned)


def test_a_containers_role_is_asked(env):
    until = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    keys = {"AccessKeyId": "of-the-role", "SecretAccessKey": "s", "Token": "t", "Expiration": until}
    role = lambda m, p: (200, {}, json.dumps(keys).encode()) if p == "/role" else not_found(m, p)
    with serving(role) as server:
        env(S3_ENDPOINT=server.url, AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{server.url}/role")
        assert not open_store("s3://bucket").exists("a")
        assert "Credential=of-the-role/" in server.requests[-1][2]["authorization"]


def test_no_keys_at_all_are_one_sentence(env):
    env(S3_ENDPOINT="http://127.0.0.1:1")
    with pytest.raises(UserError, match="needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store("s3://bucket")


# --- the way there ---


@pytest.fixture
def keys(env):
    env(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY=SECRET)


def test_requests_go_through_the_proxy_unless_no_proxy_says_otherwise(env, keys):
    with serving() as proxy, serving() as server:
        env(S3_ENDPOINT="http://s3.case.invalid", http_proxy=f"http://user:{SECRET}@{proxy.url[7:]}")
        assert not open_store("s3://bucket").exists("a")
        assert proxy.requests[0][1].startswith("http://s3.case.invalid/bucket/a")
        assert proxy.requests[0][2]["proxy-authorization"].startswith("Basic ")
        env(S3_ENDPOINT=server.url, no_proxy="localhost,127.0.0.0/8")
        assert not open_store("s3://bucket").exists("a")
        assert len(proxy.requests) == len(server.requests) == 1


def test_a_proxy_that_does_not_answer_is_named_without_its_password(env, keys):
    env(S3_ENDPOINT="http://s3.case.invalid", http_proxy=f"http://user:{SECRET}@127.0.0.1:1")
    with pytest.raises(StoreError, match=r"the proxy 127\.0\.0\.1:1") as e:
        open_store("s3://bucket", tries=0).get("a")
    assert SECRET not in str(e.value)


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("*", "http://a.b", True),
        (".svc,.cluster.local", "http://minio.ns.svc:9000", True),
        ("example.org", "https://s3.example.org", True),
        ("10.0.0.0/8", "http://10.1.2.3:9000", True),
        ("fd00::/8", "http://[fd00::1]:9000", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("ample.org", "http://example.org", False),
        ("", "http://a.b", False),
    ],
)
def test_no_proxy_takes_domains_and_networks(env, no_proxy, url, direct):
    env(HTTP_PROXY="proxy:3128", HTTPS_PROXY="http://proxy:3128", NO_PROXY=no_proxy)
    assert proxy_for(url) == (None if direct else "http://proxy:3128")


def test_a_socks_proxy_is_refused_in_one_sentence(env):
    env(ALL_PROXY="socks5://127.0.0.1:1080")
    with pytest.raises(UserError, match="all_proxy is not an http"):
        proxy_for("http://a.b")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "k.pem"), "-out", str(folder / "c.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files], check=True
    )
    return folder / "c.pem", folder / "k.pem"


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "S3_CA_BUNDLE", "AWS_CA_BUNDLE"])
def test_a_private_ca_is_trusted_by_each_of_its_names(env, keys, certificate, name):
    with serving(certificate=certificate) as server:
        env(S3_ENDPOINT=server.url, **{name: str(certificate[0])})
        assert not open_store("s3://bucket").exists("a")


def test_files_of_two_names_are_both_trusted(env, keys, certificate, tmp_path):
    """A machine's own AWS_CA_BUNDLE must not hide the SSL_CERT_FILE that somebody sets for one server."""
    other = tmp_path / "other.pem"
    subject = ["-subj", "/CN=other", "-keyout", str(tmp_path / "k.pem"), "-out", str(other)]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject], check=True)
    with serving(certificate=certificate) as server:
        env(S3_ENDPOINT=server.url, AWS_CA_BUNDLE=str(other), SSL_CERT_FILE=str(certificate[0]))
        assert not open_store("s3://bucket").exists("a")
        env(SSL_CERT_FILE=str(other))
        with pytest.raises(StoreError, match="certificate is not trusted"):
            open_store("s3://bucket").exists("a")


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_without_certificates_is_one_sentence(env, keys, tmp_path, text):
    (tmp_path / "ca.pem").write_text(text)
    env(S3_ENDPOINT="https://127.0.0.1:1", SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    with pytest.raises(UserError, match="is no file of PEM certificates"):
        open_store("s3://bucket")


def test_a_certificate_that_is_not_trusted_is_named_at_once(env, keys, certificate):
    with serving(certificate=certificate) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="certificate is not trusted: set SSL_CERT_FILE"):
            open_store("s3://bucket").exists("a")  # six tries would be half a minute


# --- what answers ---


def refusing(code: str, status: int = 403):
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    return lambda m, p: (status, {"content-type": "application/xml"}, body)


@pytest.mark.parametrize(
    ("call", "right"),
    [
        (
            lambda s: s.get("x"),
            "s3:GetObject on bucket/p/*, or, where the object does not exist, s3:ListBucket on bucket",
        ),
        (lambda s: s.exists("x"), "s3:GetObject on"),
        (lambda s: s.put("x", b"1"), "s3:PutObject on bucket/p/*"),
        (lambda s: s.create("x", b"1"), "s3:PutObject on bucket/p/*"),
        (lambda s: list(s.names()), "s3:ListBucket on bucket"),
        (lambda s: s.delete("x"), "s3:DeleteObject on bucket/p/*"),
    ],
)
def test_a_missing_right_is_named(env, keys, call, right):
    with serving(refusing("AccessDenied")) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError) as e:
            call(open_store("s3://bucket/p"))
    assert f"the keys need {right}" in str(e.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("InvalidAccessKeyId", "does not know AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY does not belong"),
        ("ExpiredToken", "get new ones"),
        ("RequestTimeTooSkewed", "clock"),
        ("AuthorizationHeaderMalformed", "set AWS_REGION"),
    ],
)
def test_refusals_say_what_to_correct(env, keys, code, message):
    with serving(refusing(code)) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match=message) as e:
            open_store("s3://bucket").get("x")
    assert SECRET not in str(e.value)


PAGES = {
    "a console that answers every path": lambda m, p: (
        200,
        {"content-type": "text/html"},
        b"<!doctype html><p>Sign in",
    ),
    "a login page": lambda m, p: (302, {"location": "/login", "content-type": "text/html"}, b"<html>"),
    "a proxy's page": lambda m, p: (403, {"content-type": "text/html; charset=utf-8"}, b"<html>Blocked"),
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.get("x"),
        lambda s: s.put("x", b"1"),
        lambda s: s.create("x", b"1"),
        lambda s: list(s.names()),
    ],
    ids=["get", "put", "create", "names"],
)
def test_a_web_page_is_recognized(env, keys, page, call):
    with serving(PAGES[page]) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="not an S3 store"):
            call(open_store("s3://bucket"))


def test_a_console_holds_no_object(env, keys):
    with serving(PAGES["a console that answers every path"]) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="not an S3 store: a web page answers"):
            open_store("s3://bucket").exists("x")


def test_the_buckets_style_can_be_part_of_the_host_name(env, keys):
    with serving() as proxy:
        env(S3_ENDPOINT="http://s3.case.invalid", http_proxy=proxy.url, S3_ADDRESSING_STYLE="virtual")
        assert not open_store("s3://bucket").exists("a")
        assert proxy.requests[0][1] == "http://bucket.s3.case.invalid/a"


# --- conditional writes, and the chart's Job ---


def test_a_store_that_ignores_the_condition_is_found_out(env, keys):
    with serving(lambda m, p: (200, {"etag": '"x"'}, b"")) as server:
        env(S3_ENDPOINT=server.url)
        assert not creates_atomically(open_store("s3://bucket"))
    with serving(refusing("NotImplemented", 501)) as server:
        env(S3_ENDPOINT=server.url)
        assert not creates_atomically(open_store("s3://bucket"))


def test_a_put_whose_answer_was_lost_still_counts_as_ours(env, keys):
    stored = b"ours"
    answers = lambda m, p: refusing("PreconditionFailed", 412)(m, p) if m == "PUT" else (200, {"etag": '"x"'}, stored)
    with serving(answers) as server:
        env(S3_ENDPOINT=server.url)
        assert open_store("s3://bucket").create("x", b"ours")
        assert not open_store("s3://bucket").create("x", b"another's")


def test_the_bucket_job_makes_a_bucket_once(s3_server, env):
    env(**s3_server)
    bucket("made-by-the-job")
    bucket("made-by-the-job")
    open_store("s3://made-by-the-job").put("x", b"1")
