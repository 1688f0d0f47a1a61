"""Profiles of AWS's own tools: the files ~/.aws/config and ~/.aws/credentials."""

import json
import re
import shlex
import shutil
import subprocess
from configparser import Error, RawConfigParser
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from feyntune.environment import variable
from feyntune.errors import UserError

_LOGINS = ("sso_session", "sso_start_url", "login_session", "role_arn")  # done by the command `aws`
_PROCESS_SECONDS = 120  # a login in the browser can be part of it


class Profile(NamedTuple):
    """A profile's values, those of the credentials file over those of the config file; and the file's services."""

    name: str
    values: dict[str, str]
    services: dict[str, dict[str, str]]

    @property
    def gives_keys(self) -> bool:
        return any(name in self.values for name in ("aws_access_key_id", "credential_process", *_LOGINS))

    @property
    def endpoint(self) -> str | None:
        """The S3 server's address, of the profile's services or its own."""
        nested = self.services.get(self.values.get("services", ""), {}).get("s3", "")
        match = re.search(r"^\s*endpoint_url\s*=\s*(\S+)", nested, re.M)
        return match[1] if match else self.values.get("endpoint_url")


def read_profile() -> Profile | None:
    """The profile AWS_PROFILE, else `default`; None where neither file has it.

    Raises:
        UserError: a file cannot be read.
    """
    name = variable("AWS_PROFILE") or "default"
    config = _parsed(variable("AWS_CONFIG_FILE") or "~/.aws/config")
    credentials = _parsed(variable("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    values = config.get(f"profile {name}", {}) | config.get(name, {}) | credentials.get(name, {})
    if not values:
        return None
    services = {key.removeprefix("services "): s for key, s in config.items() if key.startswith("services ")}
    return Profile(name, values, services)


def keys_of(profile: Profile) -> tuple[str, str, str | None, datetime | None]:
    """Access key, secret key, session token, and when they expire.

    Keys that stand in the profile, else those that its credential_process prints. A profile that logs in (SSO) or
    takes a role is left to the command `aws`, which prints the keys in the same form.

    Raises:
        UserError: there are none, the process fails, or `aws` is not installed.
    """
    values = profile.values
    if values.get("aws_access_key_id") and values.get("aws_secret_access_key"):
        token = values.get("aws_session_token")
        return values["aws_access_key_id"], values["aws_secret_access_key"], token, None
    if process := values.get("credential_process"):
        return _from_process(profile.name, process, "its credential_process")
    login = next((n for n in _LOGINS if n in values), None)
    if login is None:
        raise UserError(f"Profile {profile.name} has no pair of keys and nothing that gets them: correct it.")
    command = f"aws configure export-credentials --profile {shlex.quote(profile.name)}"
    if shutil.which("aws") is None:
        raise UserError(
            f"Profile {profile.name} gets its keys by {login}, for which the AWS command line (version 2) is needed: "
            f"install it, or set the variables that `{command} --format env` prints elsewhere."
        )
    return _from_process(profile.name, f"{command} --format process", f"`aws`, for its {login},")


def _from_process(name: str, command: str, what: str) -> tuple[str, str, str | None, datetime | None]:
    """What the command prints, by the contract of credential_process; its own errors go to standard error."""
    try:
        arguments = shlex.split(command)
        done = subprocess.run(
            arguments, check=False, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=_PROCESS_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as e:
        raise UserError(f"Profile {name}: {what} cannot be run ({type(e).__name__}): correct it.") from None
    if done.returncode != 0:
        raise UserError(f"Profile {name}: {what} ended with code {done.returncode}: log in again (`aws sso login`).")
    try:
        answer: Any = json.loads(done.stdout)
        until = answer.get("Expiration")
        keys = str(answer["AccessKeyId"]), str(answer["SecretAccessKey"])
        return *keys, answer.get("SessionToken"), datetime.fromisoformat(until) if until else None
    except (ValueError, KeyError, AttributeError, TypeError):  # not shown: it may hold a key
        raise UserError(f"Profile {name}: {what} did not print keys as JSON: correct it.") from None


def _parsed(file: str) -> dict[str, dict[str, str]]:
    """The sections of an INI file; nothing where there is none."""
    path = Path(file).expanduser()
    parser = RawConfigParser(strict=False, default_section="\0")
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, Error) as e:  # the parser's message repeats the line, which may hold a key
        line = getattr(e, "lineno", None) or next((n for n, _ in getattr(e, "errors", [])), None)
        where = f"{path}{f', line {line}' if line else ''}"
        raise UserError(f"{where}: not a file of AWS profiles ({type(e).__name__}): correct it.") from None
    return {name: dict(parser[name]) for name in parser.sections()}
