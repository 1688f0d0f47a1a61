"""S3 keys from every usual place: variables, profiles, a process, a web identity, a container's role."""

import datetime
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from feyntune.artifacts.store import open_store
from feyntune.errors import UserError
from feyntune.network import proxy_for
from feyntune.settings import S3Settings
from tests.servers.plain_http import Server, not_found, serving

SECRET = "hush-hush-secret"

pytestmark = pytest.mark.usefixtures("env")


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


def _used_key(server: Server) -> str:
    return server.requests[-1][2]["authorization"].split("Credential=")[1].split("/")[0]


def write_profiles(folder: Path, config: str, credentials: str = "") -> None:
    (folder / ".aws").mkdir()
    (folder / ".aws/config").write_text(config)
    (folder / ".aws/credentials").write_text(credentials)


def test_a_profiles_endpoint_region_and_keys_are_those_of_the_config_file(env, tmp_path):
    """As `aws configure` writes it; a key with % is no template."""
    with serving() as server:
        write_profiles(
            tmp_path,
            f"[default]\nregion = eu-west-1\n[profile lab]\nregion = eu-north-1\nendpoint_url = {server.url}\n"
            "aws_access_key_id = lab-key\naws_secret_access_key = se%cret%%\n",
        )
        env(AWS_PROFILE="lab")
        assert not open_store("s3://bucket").exists("a")
        assert "Credential=lab-key/" in server.requests[-1][2]["authorization"]
        assert "/eu-north-1/s3/" in server.requests[-1][2]["authorization"]
        with serving() as another:  # the variable comes first
            env(S3_ENDPOINT=another.url)
            assert not open_store("s3://bucket").exists("a")
            assert len(another.requests) == len(server.requests) == 1


def test_an_endpoint_among_a_profiles_services_is_read(env, tmp_path):
    write_profiles(
        tmp_path,
        "[default]\nservices = here\nendpoint_url = http://every-service:1\n"
        "[services here]\ns3 =\n  endpoint_url = http://minio:9000\n",
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n",
    )
    assert S3Settings.from_env().host == "minio:9000"


def test_a_private_servers_keys_in_a_profile_are_not_sent_to_aws(env, tmp_path):
    write_profiles(tmp_path, "", "[default]\naws_access_key_id = minioadmin\naws_secret_access_key = b\n")
    with pytest.raises(UserError, match="of profile default is not a key of AWS and no S3_ENDPOINT"):
        open_store("s3://bucket")


@pytest.mark.parametrize("seconds", [3600, 5])
def test_a_credential_process_is_run_and_again_when_its_keys_expire(env, tmp_path, seconds):
    until = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()
    keys = {"Version": 1, "AccessKeyId": "of-process", "SecretAccessKey": "s", "SessionToken": "t", "Expiration": until}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    command = f'sh -c \'echo run >> "{tmp_path}/runs"; cat "{tmp_path}/keys.json"\''
    write_profiles(tmp_path, f"[profile p]\ncredential_process = {command}\n")
    with serving() as server:
        env(S3_ENDPOINT=server.url, AWS_PROFILE="p")
        store = open_store("s3://bucket")
        assert not store.exists("a")
        assert not store.exists("b")
        assert _used_key(server) == "of-process"
        assert server.requests[-1][2]["x-amz-security-token"] == "t"
    assert len((tmp_path / "runs").read_text().splitlines()) == (1 if seconds > 60 else 3)


@pytest.mark.parametrize(
    ("process", "message"),
    [
        ("false", "ended with code 1"),
        ("/no/such/program", "cannot be run"),
        (f"echo {SECRET}", "did not print keys as JSON"),
        ("sh -c 'unfinished", "cannot be run"),
    ],
)
def test_a_credential_process_that_fails_is_one_sentence(env, tmp_path, process, message):
    write_profiles(tmp_path, f"[default]\ncredential_process = {process}\n")
    env(S3_ENDPOINT="http://127.0.0.1:1")
    with pytest.raises(UserError, match=f"Profile default: its credential_process {message}") as e:
        open_store("s3://bucket")
    assert SECRET not in str(e.value)


def test_a_profile_that_logs_in_asks_the_aws_command_or_names_it(env, tmp_path, monkeypatch):
    write_profiles(tmp_path, "[profile sso]\nsso_session = s\nsso_account_id = 1\n[sso-session s]\nsso_region = x\n")
    (tmp_path / "bin").mkdir()
    with serving() as server:
        env(S3_ENDPOINT=server.url, AWS_PROFILE="sso")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        with pytest.raises(UserError, match="aws configure export-credentials --profile sso --format env"):
            open_store("s3://bucket")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        aws = tmp_path / "bin/aws"
        aws.write_text('#!/bin/sh\necho "{\\"AccessKeyId\\": \\"$4\\", \\"SecretAccessKey\\": \\"s\\"}"\n')
        aws.chmod(0o755)
        assert not open_store("s3://bucket").exists("a")
        assert _used_key(server) == "sso"


def test_a_file_that_is_no_file_of_profiles_is_named_without_its_lines(env, tmp_path):
    write_profiles(tmp_path, f"{SECRET}\n")
    with pytest.raises(UserError, match=r"\.aws/config, line 1: not a file of AWS profiles") as e:
        S3Settings.from_env()
    assert SECRET not in str(e.value)


def test_a_file_without_the_default_profile_gives_no_keys(env, tmp_path):
    write_profiles(tmp_path, "[profile other]\nregion = x\n", "[other]\naws_access_key_id = a\n")
    env(S3_ENDPOINT="http://127.0.0.1:1")
    with pytest.raises(UserError, match="needs AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket")


def test_a_pods_identity_sends_its_token_and_no_proxy_is_asked(env, tmp_path):
    until = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    keys = {"AccessKeyId": "of-pod", "SecretAccessKey": "s", "Token": "t", "Expiration": until}
    (tmp_path / "token").write_text("token-of-the-pod")
    role = lambda m, p: (200, {}, json.dumps(keys).encode()) if p == "/v1/credentials" else not_found(m, p)
    with serving(role) as server:
        env(
            S3_ENDPOINT=server.url,
            AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{server.url}/v1/credentials",
            AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(tmp_path / "token"),
        )
        assert not open_store("s3://bucket").exists("a")
        assert server.requests[0][2]["authorization"] == "token-of-the-pod"
        assert _used_key(server) == "of-pod"
    env(http_proxy="http://proxy:3128")
    assert proxy_for("http://169.254.170.23/v1/credentials") is None
    assert proxy_for("http://[fe80::1]/x") is None


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
