"""S3 as its users set it up: addresses, proxies, private CAs, and refusals that say what to do."""

import subprocess
from pathlib import Path

import pytest

from feyntune.artifacts.names import StoreError
from feyntune.artifacts.store import creates_atomically, open_store
from feyntune.errors import UserError
from feyntune.kubeflow.chart_jobs import bucket
from feyntune.network import proxy_for
from feyntune.settings import S3Settings
from tests.servers.plain_http import serving

SECRET = "hush-hush-secret"
KEY_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

pytestmark = pytest.mark.usefixtures("env")


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
        ({"S3_ENDPOINT": "http://h h:1"}, "not a URL"),
        ({"S3_ENDPOINT": "http://h:1?x=1"}, "has a . or # after the host"),
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


@pytest.mark.parametrize("written", ['"{}"', "'{}'", "\ufeff{}", "{}\r\n", ' "{}" \n'])
def test_what_files_and_docker_leave_around_a_value_is_no_part_of_it(env, written):
    env(S3_ENDPOINT=written.format("http://h:1"), AWS_ACCESS_KEY_ID=written.format("a"), AWS_SECRET_ACCESS_KEY="b")
    settings = S3Settings.from_env()
    assert (settings.host, settings.access_key.get_secret_value()) == ("h:1", "a")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("value", ["a\nb", "a b", "\u00e4"])
def test_a_key_that_no_request_can_carry_is_one_sentence_without_it(env, name, value):
    env(S3_ENDPOINT="http://h:1", **{**dict.fromkeys(KEY_NAMES, "k"), name: SECRET + value})
    with pytest.raises(UserError, match=f"{name} holds") as e:
        S3Settings.from_env()
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("bucket", ["a", "b b", "-ab", "1.2.3.4", "b\u00fc", "x" * 64])
def test_a_name_that_no_bucket_has_is_one_sentence(env, bucket):
    env(S3_ENDPOINT="http://h:1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    with pytest.raises(UserError, match="is not a bucket's name"):
        open_store(f"s3://{bucket}/p")


def test_capitals_in_a_bucket_are_refused_by_aws_alone(env):
    env(S3_ENDPOINT="http://h:1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    open_store("s3://My_Bucket")
    env(S3_ENDPOINT="https://s3.amazonaws.com")
    with pytest.raises(UserError, match="is not a bucket's name"):
        open_store("s3://My_Bucket")


@pytest.mark.parametrize("region", ["nowhere in particular", "eu west"])
def test_an_impossible_region_is_one_sentence(env, region):
    env(S3_ENDPOINT="http://h:1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_REGION=region)
    with pytest.raises(UserError, match="cannot be used"):
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
    "a page in another encoding": lambda m, p: (
        403,
        {"content-type": "text/html; charset=iso-8859-1"},
        "<html>Zugriff verweigert: gehört nicht dazu".encode("latin-1"),
    ),
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


@pytest.mark.parametrize("call", [lambda s: s.get("x"), lambda s: s.exists("x")])
def test_a_server_that_is_no_store_at_all_is_recognized(env, keys, call):
    with serving(lambda m, p: (200, {"content-type": "application/json"}, b"{}")) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="not an S3 store"):
            call(open_store("s3://bucket"))


def test_a_refused_head_says_why(env, keys):
    """HEAD's answer has no body: 403 could be a missing right, a wrong key or a wrong clock."""
    with serving(refusing("RequestTimeTooSkewed")) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="clock differs"):
            open_store("s3://bucket").exists("x")


@pytest.mark.parametrize(
    ("headers", "message"),
    [({"x-amz-bucket-region": "eu-west-1"}, "m"), ({}, "the region 'us-east-1' is wrong; expecting 'eu-west-1'")],
)
def test_the_region_that_a_store_names_is_passed_on(env, keys, headers, message):
    body = f"<Error><Code>AuthorizationHeaderMalformed</Code><Message>{message}</Message></Error>".encode()
    with serving(lambda m, p: (400, {"content-type": "application/xml", **headers}, body)) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="set AWS_REGION to eu-west-1"):
            open_store("s3://bucket").get("x")


def test_a_proxy_that_wants_a_password_is_named(env, keys):
    with serving(lambda m, p: (407, {"content-type": "text/html"}, b"<html>")) as proxy:
        env(S3_ENDPOINT="http://s3.case.invalid", http_proxy=proxy.url)
        with pytest.raises(StoreError, match=f"the proxy {proxy.url[7:]} wants a user and a password"):
            open_store("s3://bucket").get("x")


def test_a_page_that_came_through_a_proxy_names_it(env, keys):
    with serving(PAGES["a proxy's page"]) as proxy:
        env(S3_ENDPOINT="http://s3.case.invalid", http_proxy=proxy.url)
        with pytest.raises(StoreError, match=f"goes through the proxy {proxy.url[7:]}"):
            open_store("s3://bucket").get("x")


def test_a_store_that_keeps_failing_is_not_called_silent(env, keys):
    with serving(lambda m, p: (503, {"content-type": "text/html"}, b"<html>maintenance")) as server:
        env(S3_ENDPOINT=server.url)
        with pytest.raises(StoreError, match="keeps answering HTTP 503"):
            open_store("s3://bucket", tries=0).get("x")


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


def test_a_store_that_passes_one_round_of_the_probe_by_luck_is_found_out(env, keys):
    """A server that looks whether the object exists, and then writes, is right as long as nobody comes between."""
    asked: list[str] = []

    def answer(method: str, path: str):
        if method != "PUT":
            return 200, {"etag": '"x"'}, b"another's"
        asked.append(path)
        met_before = path == asked[0] and asked.count(path) > 1
        return refusing("PreconditionFailed", 412)(method, path) if met_before else (200, {"etag": '"x"'}, b"")

    with serving(answer) as server:
        env(S3_ENDPOINT=server.url)
        assert not creates_atomically(open_store("s3://bucket"))
    assert len(asked) == 8  # two rounds of four


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
