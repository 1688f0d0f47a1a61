"""What the environment decides: where the object store is, and its keys.

Keys come from the environment only (on a cluster, from a Secret), never from parameters or files of a run. The
names are those of AWS's own tools, with S3_ENDPOINT, S3_CA_BUNDLE and S3_ADDRESSING_STYLE beside them.
"""

import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from feyntune.aws_profile import read_profile
from feyntune.environment import is_sendable, variable
from feyntune.errors import UserError

AWS = "https://s3.amazonaws.com"
ENDPOINTS = ("S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
# AWS's access keys, as its documentation of IAM identifiers gives them: AKIA… (long-term), ASIA… (temporary).
_AWS_KEY = re.compile(r"A[A-Z]{3}[A-Z0-9]{12,124}")


class S3Settings(BaseModel):
    """An S3 server, and the keys for it where they are static."""

    model_config = ConfigDict(frozen=True)

    host: str  # "minio.example:9000"
    secure: bool
    access_key: SecretStr | None = None  # None: from a profile, a web identity or a role (feyntune.artifacts.s3)
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    ca_bundle: str | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.host}"

    @property
    def is_aws(self) -> bool:
        hostname = urlsplit(self.url).hostname or ""
        return hostname.endswith((".amazonaws.com", ".amazonaws.com.cn"))

    @classmethod
    def from_env(cls) -> "S3Settings":
        """Reads the environment.

        S3_ENDPOINT, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (default: AWS); AWS_ACCESS_KEY_ID,
        AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; AWS_REGION or AWS_DEFAULT_REGION (default: us-east-1);
        where there is none, endpoint and region of the profile (feyntune.aws_profile);
        S3_CA_BUNDLE or AWS_CA_BUNDLE (a PEM file); S3_ADDRESSING_STYLE (auto, path or virtual).

        Raises:
            UserError: the endpoint is not the http(s) URL of a server, one key of two is missing, keys that are not
                AWS's would be sent to AWS, or another value cannot be used.
        """
        profile = read_profile()
        host, secure = _endpoint(profile.endpoint if profile else None)
        access_key, secret_key = _key("AWS_ACCESS_KEY_ID"), _key("AWS_SECRET_ACCESS_KEY")
        if (access_key is None) != (secret_key is None):
            missing = "AWS_ACCESS_KEY_ID" if access_key is None else "AWS_SECRET_ACCESS_KEY"
            raise UserError(f"An s3:// address needs {missing} in the environment beside the other key: set it.")
        region = variable("AWS_REGION", "AWS_DEFAULT_REGION") or (profile and profile.values.get("region"))
        chosen = variable(*ENDPOINTS) or (profile and profile.endpoint) or region  # a region alone means AWS
        used = access_key or (profile and profile.values.get("aws_access_key_id"))
        if used and not chosen and not _AWS_KEY.fullmatch(used):
            where = "AWS_ACCESS_KEY_ID" if access_key else f"aws_access_key_id of profile {profile and profile.name}"
            raise UserError(
                f"{where} is not a key of AWS and no S3_ENDPOINT is set: set S3_ENDPOINT to your server, "
                "such as http://minio.example:9000."
            )
        style = variable("S3_ADDRESSING_STYLE") or "auto"
        if style not in ("auto", "path", "virtual"):
            raise UserError(f"S3_ADDRESSING_STYLE is {style!r}: use auto, path or virtual.")
        bundle = variable("S3_CA_BUNDLE", "AWS_CA_BUNDLE")
        if bundle and not Path(bundle).expanduser().is_file():
            name = "S3_CA_BUNDLE" if variable("S3_CA_BUNDLE") else "AWS_CA_BUNDLE"
            raise UserError(f"{name} is {bundle}, which is not a file: give the path of a PEM file.")
        token = _key("AWS_SESSION_TOKEN")
        return cls(
            host=host,
            secure=secure,
            access_key=SecretStr(access_key) if access_key else None,
            secret_key=SecretStr(secret_key) if secret_key else None,
            session_token=SecretStr(token) if token and access_key else None,
            region=region or "us-east-1",
            addressing_style=style,  # type: ignore[arg-type]
            ca_bundle=str(Path(bundle).expanduser()) if bundle else None,
        )


def _key(name: str) -> str | None:
    """A key or token.

    Raises:
        UserError: it holds what no header can: a line break, a space, or what is not ASCII.
    """
    value = variable(name)
    if value and not is_sendable(value):
        raise UserError(f"{name} holds a line break, a space or a character that is not ASCII: copy it again.")
    return value


def _endpoint(of_profile: str | None) -> tuple[str, bool]:
    """Host (with port) and whether it is https."""
    name = next((n for n in ENDPOINTS if variable(n)), "The profile's endpoint_url" if of_profile else ENDPOINTS[0])
    endpoint = variable(*ENDPOINTS) or of_profile or AWS
    url = urlsplit(endpoint)
    try:
        hostname, port = url.hostname, url.port
    except ValueError:
        hostname = port = None
    if url.scheme not in ("http", "https") or not hostname or port == 0 or re.search(r"\s", endpoint):
        shown = endpoint.rpartition("@")[2]  # what is before an @ may be a key
        raise UserError(f"{name} is {shown!r}, not a URL such as http://minio.example:9000: correct it.")
    if "@" in url.netloc:
        raise UserError(
            f"{name} holds a user or a key: give the URL alone, and the keys in AWS_ACCESS_KEY_ID and so on."
        )
    if url.query or url.fragment:
        raise UserError(f"{name} has a ? or # after the host, which is no part of an address: remove what follows it.")
    if url.path.strip("/"):
        raise UserError(
            f"{name} has the path {url.path!r}, which S3 endpoints cannot have (requests are signed without it): "
            "give the server a host name or a port of its own."
        )
    return url.netloc, url.scheme == "https"
