"""What the environment decides: where the object store is, its keys, and where metrics go.

Keys come from the environment only (on a cluster, from a Secret), never from parameters or files of a run.
"""

import os
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr

from feyntune.errors import UserError


class S3Settings(BaseModel):
    """An S3 endpoint and its keys."""

    model_config = ConfigDict(frozen=True)

    host: str  # "minio.example:9000"
    secure: bool
    access_key: SecretStr
    secret_key: SecretStr
    region: str | None = None

    @classmethod
    def from_env(cls) -> "S3Settings":
        """Reads S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION (optional).

        Raises:
            UserError: one of the three is not set, or the endpoint is not an http(s) URL.
        """
        missing = [n for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(n)]
        if missing:
            raise UserError(f"An s3:// address needs {' and '.join(missing)} in the environment: set them.")
        endpoint = os.environ.get("S3_ENDPOINT", "https://s3.amazonaws.com")
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise UserError(f"S3_ENDPOINT is {endpoint!r}, not a URL such as http://minio.example:9000: correct it.")
        return cls(
            host=url.netloc,
            secure=url.scheme == "https",
            access_key=SecretStr(os.environ["AWS_ACCESS_KEY_ID"]),
            secret_key=SecretStr(os.environ["AWS_SECRET_ACCESS_KEY"]),
            region=os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        )
