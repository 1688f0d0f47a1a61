"""The one S3 client of the project: where its keys come from, how it connects, and what its errors mean."""

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.credentials import Credentials, IamAwsProvider, Provider, StaticProvider
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from minio.helpers import check_bucket_name

from feyntune.artifacts.names import Missing, StoreError, checked_name, parse_address
from feyntune.aws_profile import keys_of, read_profile
from feyntune.environment import variable
from feyntune.errors import UserError
from feyntune.network import describe_failure, http_pool, is_untrusted, proxy_for, shown
from feyntune.settings import S3Settings

# What a store's refusal means for the person who reads it.
_HINTS = {
    "InvalidAccessKeyId": "the store does not know AWS_ACCESS_KEY_ID: check S3_ENDPOINT and the key",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: check both",
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the keys: get all three again",
    "InvalidClientTokenId": "AWS_SESSION_TOKEN does not belong to the keys: get all three again",
    "ExpiredToken": "the temporary keys have expired: get new ones",
    "ExpiredTokenException": "the temporary keys have expired: get new ones",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's: set it",
    "AuthorizationHeaderMalformed": "the store is in another region: set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region or at another endpoint: set AWS_REGION or S3_ENDPOINT",
    "Redirect": "the bucket is in another region or at another endpoint: set AWS_REGION or S3_ENDPOINT",
    "QuotaExceeded": "the quota is used up: delete what is not needed, or have it raised",
    "XMinioStorageFull": "the store's disk is full: free some space there",
    "AllAccessDisabled": "the bucket or the account is disabled: ask who runs it",
}
_NOT_S3 = "the answer is not S3's: check S3_ENDPOINT"
_PAGE = "a web page answers, not S3 (a console, a login page or a proxy): set S3_ENDPOINT to the port of the S3 API"


CONNECT_SECONDS, READ_SECONDS = 10, 60  # how long one try of a request waits
_CONFLICTS = 20  # tries of a conditional PUT that meets another one under way


class _Retry(urllib3.Retry):
    """urllib3's retries, but for a certificate that is not trusted: the next try would be refused too."""

    def increment(self, *args: Any, **options: Any) -> "_Retry":
        error = options.get("error")
        if error is not None and is_untrusted(error):
            raise error
        return super().increment(*args, **options)


def s3_client(settings: S3Settings, tries: int = 6) -> Minio:
    """A client for `settings`, through the environment's proxy.

    Args:
        tries: how often an unanswered request is repeated, waiting 0.5, 1, 2, 4 … s; 6 is half a minute, 8 two.

    Raises:
        UserError: there are no keys, or the endpoint or region cannot be used.
    """
    pool = http_pool(
        settings.url,
        settings.ca_bundle,
        maxsize=16,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=_Retry(
            total=tries,
            redirect=False,  # to a login page, for one
            backoff_factor=0.5,
            status_forcelist=(500, 502, 503, 504),
            allowed_methods=None,  # POST too, with which a large upload begins and ends
        ),
    )
    provider = _provider(settings)
    try:
        client = Minio(
            settings.host, secure=settings.secure, region=settings.region, http_client=pool, credentials=provider
        )
    except ValueError as e:
        raise UserError(f"{settings.url} with region {settings.region} cannot be used ({e}): correct them.") from e
    if settings.addressing_style == "virtual":
        client.enable_virtual_style_endpoint()
    elif settings.addressing_style == "path":
        client.disable_virtual_style_endpoint()
    provider.retrieve()  # keys that cannot be had are reported here and not by the first request
    return client


def _provider(settings: S3Settings) -> Provider:
    """Static keys, else a web identity or a container's role, else a profile, else (for AWS) the instance's role."""
    if settings.access_key and settings.secret_key:
        token = settings.session_token.get_secret_value() if settings.session_token else None
        return StaticProvider(settings.access_key.get_secret_value(), settings.secret_key.get_secret_value(), token)
    containers = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if variable("AWS_WEB_IDENTITY_TOKEN_FILE"):
        # A token for a private server goes to that server's own token service (MinIO has it at its root).
        sts = variable("AWS_ENDPOINT_URL_STS") or (None if settings.is_aws else settings.url)
        where = sts or "https://sts.amazonaws.com"
        return _Fetched(
            IamAwsProvider(custom_endpoint=sts, http_client=_keys_pool(where), region=settings.region),
            "the web identity (AWS_WEB_IDENTITY_TOKEN_FILE, AWS_ROLE_ARN)",
        )
    if variable(*containers):
        where = variable("AWS_CONTAINER_CREDENTIALS_FULL_URI") or "http://169.254.170.2"
        return _Fetched(IamAwsProvider(http_client=_keys_pool(where)), "the container's role")
    if variable("AWS_PROFILE") or ((profile := read_profile()) and profile.gives_keys):
        return _OfProfile()
    if settings.is_aws and (variable("AWS_EC2_METADATA_DISABLED") or "").lower() != "true":
        metadata = variable("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        where = metadata or "http://169.254.169.254"
        return _Fetched(IamAwsProvider(custom_endpoint=metadata, http_client=_keys_pool(where, 1)), None)
    raise UserError(_NO_KEYS)


_NO_KEYS = (
    "An s3:// address needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment (or a profile, "
    "AWS_WEB_IDENTITY_TOKEN_FILE, or a role of the machine): set them."
)


class _OfProfile(Provider):
    """Keys of a profile: the file is read and its process run again when they expire."""

    def __init__(self) -> None:
        self.held: Credentials | None = None

    def retrieve(self) -> Credentials:
        if self.held is None or self.held.is_expired():
            profile = read_profile()
            if profile is None:
                raise UserError(
                    f"There is no profile {variable('AWS_PROFILE') or 'default'} in ~/.aws/config or "
                    "~/.aws/credentials (or where AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE say): correct "
                    "AWS_PROFILE."
                )
            access_key, secret_key, token, until = keys_of(profile)
            self.held = Credentials(access_key, secret_key, session_token=token, expiration=until or _soon())
        return self.held


def _soon() -> datetime:
    """When keys that stand in a file are read again: other tools renew them there."""
    return datetime.now(UTC) + timedelta(minutes=5)


class _Fetched(Provider):
    """Keys that come from elsewhere and are fetched again before they expire.

    minio's own errors are not passed on: they can hold a token as part of an address.
    """

    def __init__(self, source: Provider, what: str | None):
        self.source, self.what = source, what

    def retrieve(self) -> Credentials:
        for attempt in range(3 if self.what else 1):
            try:
                return self.source.retrieve()
            except (OSError, ValueError, LookupError, TypeError, urllib3.exceptions.HTTPError) as e:
                reason = type(e).__name__
                time.sleep(0.2 * attempt)
        if self.what is None:
            raise UserError(_NO_KEYS) from None
        raise UserError(f"No S3 keys were returned by {self.what} ({reason}): correct it.") from None


def _keys_pool(url: str, seconds: float = 10) -> urllib3.PoolManager:
    # No retries by urllib3: it would log the address, which holds the token of a web identity.
    return http_pool(url, timeout=seconds, retries=urllib3.Retry(0, redirect=False))


class S3Store:
    """A bucket, or a prefix of one, on any S3 server. Keys never appear in messages."""

    def __init__(self, uri: str, settings: S3Settings, tries: int = 6):
        _, self.bucket, self.prefix = parse_address(uri)
        self.uri = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.endpoint = settings.url
        try:
            check_bucket_name(self.bucket, strict=settings.is_aws, s3_check=settings.is_aws)
        except ValueError:
            raise UserError(
                f"Store {uri}: {self.bucket!r} is not a bucket's name (3 to 63 of a-z, 0-9, . and -): correct it."
            ) from None
        self.client = s3_client(settings, tries)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{checked_name(name)}" if self.prefix else checked_name(name)

    def _right(self, right: str) -> str:
        """Where a right is missing, in the words of a policy."""
        resource = self.bucket if right == "s3:ListBucket" else f"{self.bucket}/{self.prefix}/*".replace("//", "/")
        return f"{right} on {resource}"

    @contextmanager
    def _asking(self, name: str, right: str) -> Iterator[None]:
        """Whatever goes wrong with the object `name` becomes a StoreError; `right` is what the request needs."""
        where = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except S3Error as e:
            if e.code in ("NoSuchKey", "NoSuchObject"):
                raise Missing(f"{where} does not exist.") from e
            if e.code == "NoSuchBucket":
                raise StoreError(f"Bucket {self.bucket} does not exist: create it, or correct the address.") from e
            if e.code == "AccessDenied":
                rights = self._right(right)
                if right == "s3:GetObject":  # without it a store hides whether an object exists
                    rights += f", or, where the object does not exist, {self._right('s3:ListBucket')}"
                raise StoreError(f"{where}: the store denies access: the keys need {rights}.") from e
            if hint := _HINTS.get(e.code or ""):
                expected = re.search(r"expecting '([\w-]+)'", e.message or "")
                region = e.response.headers.get("x-amz-bucket-region") or (expected and expected[1])
                correction = hint.replace("AWS_REGION", f"AWS_REGION to {region}") if region else hint
                raise StoreError(f"{where}: {e.code}: {correction}.") from e
            if not e.code:
                raise StoreError(f"{where}: {self.endpoint} is not an S3 store: {_NOT_S3}.") from e
            raise StoreError(f"{where}: the store answered {e.code}{f' ({e.message})' if e.message else ''}.") from e
        except (InvalidResponseError, ParseError, UnicodeDecodeError) as e:
            if isinstance(e, InvalidResponseError) and e._code == 407:
                raise StoreError(
                    f"{where}: the proxy {shown(proxy_for(self.endpoint))} wants a user and a password: set "
                    "http_proxy=http://USER:PASSWORD@HOST:PORT."
                ) from None
            page = not isinstance(e, InvalidResponseError) or "html" in str(e)[:300].lower()
            raise StoreError(
                f"{where}: {self.endpoint} is not an S3 store: {self._page() if page else _NOT_S3}."
            ) from None
        except ServerError as e:
            raise StoreError(f"{where}: {self.endpoint} answered HTTP {e.status_code}: check S3_ENDPOINT.") from e
        except MinioException as e:
            raise StoreError(f"{where}: {self.endpoint} is not an S3 store: check S3_ENDPOINT.") from e
        except urllib3.exceptions.HTTPError as e:
            failure = describe_failure(e, self.endpoint)
            state = "gives no result" if "HTTP" in failure else "does not answer"
            raise StoreError(f"{where}: the store at {self.endpoint} {state} ({failure}): check S3_ENDPOINT.") from e

    def _page(self) -> str:
        proxy = proxy_for(self.endpoint)
        return f"{_PAGE}; the request goes through the proxy {shown(proxy)} (no_proxy)" if proxy else _PAGE

    def _check_is_s3(self, headers: Any, name: str) -> None:
        """A console answers every path with its page and status 200; an S3 store gives every object an ETag."""
        if not headers.get("etag"):
            what = self._page() if "html" in headers.get("content-type", "") else _NOT_S3
            raise StoreError(f"{self.uri}/{name}: {self.endpoint} is not an S3 store: {what}.")

    def _stat(self, name: str) -> Any:
        """What HEAD tells of an object. A refusal has no body there, so GET is asked for the reason."""
        with self._asking(name, "s3:GetObject"):
            try:
                return self.client.stat_object(self.bucket, self._key(name))
            except S3Error as e:
                if e.code not in ("AccessDenied", "BadRequest"):
                    raise
                self.client.get_object(self.bucket, self._key(name), length=1).close()
                raise

    def get(self, name: str) -> bytes:
        with self._asking(name, "s3:GetObject"):
            response = self.client.get_object(self.bucket, self._key(name))
            try:
                self._check_is_s3(response.headers, name)
                return response.read()
            finally:
                response.close()
                response.release_conn()

    def put(self, name: str, data: bytes) -> None:
        with self._asking(name, "s3:PutObject"):
            result = self.client.put_object(self.bucket, self._key(name), io.BytesIO(data), len(data))
            self._check_is_s3({"etag": result.etag, "content-type": "html"}, name)

    def create(self, name: str, data: bytes) -> bool:
        """One PUT with `If-None-Match: *`; minio's own put_object has no parameter for it.

        Raises:
            StoreError: also where the store does not know conditional writes and says so.
        """
        headers: Any = {"If-None-Match": "*", "Content-Type": "application/octet-stream"}
        for _ in range(_CONFLICTS):
            with self._asking(name, "s3:PutObject"):
                try:
                    answer = self.client._execute("PUT", self.bucket, self._key(name), body=data, headers=dict(headers))
                except S3Error as e:
                    if e.code == "ConditionalRequestConflict":  # another PUT is under way (AWS): see how it ends
                        time.sleep(0.1)
                        continue
                    if e.code != "PreconditionFailed":
                        raise
                    # A PUT that was sent again after its answer got lost meets its own object.
                    return self.get(name) == data
                self._check_is_s3(answer.headers, name)
                return True
        raise StoreError(f"{self.uri}/{name}: the store keeps answering ConditionalRequestConflict: try again later.")

    def modified(self, name: str) -> datetime:
        return self._stat(name).last_modified or datetime.now(UTC)

    def get_file(self, name: str, path: Path) -> None:
        with self._asking(name, "s3:GetObject"):
            self.client.fget_object(self.bucket, self._key(name), str(path))

    def put_file(self, name: str, path: Path) -> None:
        with self._asking(name, "s3:PutObject"):
            try:
                self.client.fput_object(self.bucket, self._key(name), str(path))
            except S3Error as e:
                # The upload was ended, the answer got lost, and its end was asked for again: all is well.
                if e.code != "NoSuchUpload" or not self.exists(name):
                    raise

    def exists(self, name: str) -> bool:
        try:
            stat = self._stat(name)
        except Missing:
            return False
        self._check_is_s3(stat.metadata or {}, name)
        return True

    def names(self, prefix: str = "") -> Iterator[str]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._asking(prefix, "s3:ListBucket"):
            for item in self.client.list_objects(self.bucket, prefix=start + prefix, recursive=True):
                yield str(item.object_name).removeprefix(start)

    def delete(self, name: str) -> None:
        with self._asking(name, "s3:DeleteObject"):
            self.client.remove_object(self.bucket, self._key(name))


def make_bucket(name: str) -> bool:
    """Make the bucket `name` on the S3 server of the environment; False where it exists already.

    Raises:
        UserError: the server does not answer or refuses.
    """
    settings = S3Settings.from_env()
    store = S3Store(f"s3://{name}", settings, tries=7)  # a bundled store starts at the same time: wait a minute
    with store._asking("", "s3:CreateBucket"):
        try:
            if store.client.bucket_exists(name):
                return False
            store.client.make_bucket(name, location=settings.region)
        except S3Error as e:
            if e.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
            return False
    return True
