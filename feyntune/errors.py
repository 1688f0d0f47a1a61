"""The two ways a step ends early on purpose, and the exit codes they mean; what a full disk says."""

import errno
import os

EXIT_BAD_INPUT = 2
EXIT_FAILED_BRANCH = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: state is saved, start again to resume


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: where, what, and what to change."""


class Interrupted(Exception):
    """The step was asked to stop, has saved its state, and resumes from there when started again."""


class VariantsFailed(Exception):
    """Some variants of the run failed; their results are missing from the report, which names them."""


WRITE_FIXES = {
    errno.ENOSPC: "the disk is full, free some space",
    errno.EDQUOT: "your disk quota is used up, free some space",
    errno.EROFS: "the file system is read-only, choose another folder",
    errno.EACCES: "you have no right to write there, choose another folder",
    errno.EPERM: "you have no right to write there, choose another folder",
    errno.ENOTDIR: "a part of the path is a file, choose another folder",
    errno.ENAMETOOLONG: "the path is too long, choose a shorter folder",
}


def write_failure(error: BaseException) -> str | None:
    """One sentence for an error that a full or read-only disk causes, in whatever library; None for another."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and "No space left on device" in str(error):  # safetensors, torch
        number = errno.ENOSPC
    fix = WRITE_FIXES.get(number or 0)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EPERM):
        fix = "change its rights, or choose another" if name else None  # else perhaps no file at all
    if fix is None:
        return None
    return f"{name or 'A file'} cannot be opened or written ({os.strerror(number or 0)}): {fix}."
