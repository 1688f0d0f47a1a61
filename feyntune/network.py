"""HTTP connections as users of curl, pip and the AWS command line know them: through proxies, with private CAs."""

import contextlib
import ipaddress
import os
import re
import socket
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import certifi
import urllib3
from urllib3.util.ssl_ import create_urllib3_context

from feyntune.errors import UserError


def checked_address(url: str, example: str) -> str:
    """`url` if it is the address of a web server and holds no password, which would stand in logs.

    Raises:
        UserError: it is not.
    """
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong, parts = True, urlsplit("")
    if wrong or re.search(r"\s", url):
        raise UserError(f"{url.rpartition('@')[2]} is not a web address: write {example}.")
    if "@" in parts.netloc:
        raise UserError(f"The address of {parts.hostname} holds a user or a password: give it without.")
    return url


def proxy_for(url: str) -> str | None:
    """The proxy for `url` by http_proxy, https_proxy, all_proxy and no_proxy (either case); None for none.

    no_proxy takes host names, domains, addresses and networks (10.0.0.0/8).

    Raises:
        UserError: the proxy is not an http(s) URL.
    """
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(parts.hostname or "").is_link_local:  # a metadata service of this machine or pod
            return None
    proxies = getproxies_environment()
    proxy = (proxies.get(parts.scheme) or proxies.get("all") or "").strip()
    if not proxy or proxy_bypass_environment(parts.netloc, proxies) or _in_network(parts.hostname, proxies.get("no")):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https") or not urlsplit(proxy).hostname:
        name = f"{parts.scheme}_proxy" if proxies.get(parts.scheme) else "all_proxy"
        raise UserError(
            f"{name} is not an http:// or https:// address: correct it, or add {parts.hostname} to no_proxy."
        )
    return proxy


def _in_network(hostname: str | None, no_proxy: str | None) -> bool:
    try:
        address = ipaddress.ip_address(hostname or "")
    except ValueError:
        return False
    for entry in (no_proxy or "").split(","):
        try:
            if address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def http_pool(url: str, ca_bundle: str | None = None, **options: Any) -> urllib3.PoolManager:
    """A connection pool for `url`, through the environment's proxy for it.

    Args:
        ca_bundle: a PEM file of certificate authorities, trusted beside those of SSL_CERT_FILE; without either the
            system's.
        options: of urllib3's PoolManager.

    Raises:
        UserError: the proxy or a file of certificates cannot be used.
    """
    if urlsplit(url).scheme == "https":
        options["ssl_context"] = _trusting(ca_bundle, certificates_file())
    proxy = proxy_for(url)
    if proxy is None:
        return urllib3.PoolManager(**options)
    parts = urlsplit(proxy)
    headers = None
    if parts.username:
        headers = urllib3.make_headers(
            proxy_basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}",
        )
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # the password stays out of messages
    return urllib3.ProxyManager(address, proxy_headers=headers, **options)


def httpx_options(url: str) -> dict[str, Any]:
    """Arguments of an httpx client that talks to `url`: the same proxy and certificates as `http_pool`'s.

    Raises:
        UserError: the proxy or SSL_CERT_FILE cannot be used.
    """
    context = _trusting(certificates_file())
    return {"proxy": proxy_for(url), "verify": context, "trust_env": False}


def certificates_file() -> str | None:
    """The PEM file of certificate authorities that the environment names."""
    return os.environ.get("SSL_CERT_FILE", "").strip() or None


def _trusting(*bundles: str | None) -> ssl.SSLContext:
    """Trusts the certificate authorities of these PEM files; without any the system's and certifi's.

    Python on macOS has none of the system's until a script that comes with it is run.
    """
    context = create_urllib3_context()
    given = [*dict.fromkeys(b for b in bundles if b)]
    if not given:
        context.load_default_certs()
        context.load_verify_locations(certifi.where())
    for bundle in given:
        try:
            context.load_verify_locations(bundle)
        except (OSError, ssl.SSLError) as e:  # a folder, another format, an empty file
            raise UserError(
                f"{bundle} (SSL_CERT_FILE, S3_CA_BUNDLE or AWS_CA_BUNDLE) is no file of PEM certificates: correct it."
            ) from e
    return context


def refuse_link_local(url: str) -> None:
    """Refuse a URL whose host is link-local: 169.254.169.254 hands a cloud's credentials to whoever asks.

    Raises:
        UserError: it is.
    """
    hostname = urlsplit(url).hostname or ""
    if proxy_for(url) is not None:
        addresses = [hostname]  # the proxy resolves names
    else:
        try:
            addresses = [str(info[4][0]) for info in socket.getaddrinfo(hostname, None)]
        except OSError:
            return  # the request itself says so
    for address in addresses:
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_address(address.partition("%")[0])
            if ip.is_link_local or (
                isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped and ip.ipv4_mapped.is_link_local
            ):
                raise UserError(f"{url} is a link-local address (such as a cloud's metadata service): it is refused.")


def describe_failure(error: Exception, url: str) -> str:
    """Why a request to `url` failed, in words that name the proxy or the certificate where one is the cause."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.ProxyError):
        return f"the proxy {shown(proxy_for(url))} does not let the request through: check https_proxy and no_proxy"
    if isinstance(reason, urllib3.exceptions.SSLError) and "CERTIFICATE" in str(reason).upper():
        return "its TLS certificate is not trusted: set SSL_CERT_FILE to the PEM file of the certificate authority"
    if isinstance(reason, urllib3.exceptions.SSLError):
        return "it does not speak TLS on this port: check https:// against http://"
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return "its host name cannot be resolved: check the address"
    if isinstance(reason, urllib3.exceptions.ResponseError):  # "too many 503 error responses"
        status = re.search(r"\b\d{3}\b", str(reason))
        return f"it keeps answering HTTP {status[0]}" if status else str(reason)
    for kind, words in _FAILURES.items():
        if isinstance(reason, kind):
            return words
    return type(reason).__name__


_FAILURES: dict[type[Exception], str] = {
    urllib3.exceptions.NewConnectionError: "no connection: nothing listens there",  # a kind of the next
    urllib3.exceptions.ConnectTimeoutError: "no connection in time: a wrong address, or a firewall",
    urllib3.exceptions.ReadTimeoutError: "it takes connections and does not answer in time",
    urllib3.exceptions.ProtocolError: "the connection broke",
    urllib3.exceptions.IncompleteRead: "the connection broke",
}


def shown(proxy: str | None) -> str:
    """A proxy's host and port, without its password."""
    return urlsplit(proxy or "").netloc.rpartition("@")[2]


def is_untrusted(error: Exception | None) -> bool:
    """Whether a TLS certificate was refused, which no retry changes."""
    return isinstance(error, urllib3.exceptions.SSLError) and "CERTIFICATE" in str(error).upper()
