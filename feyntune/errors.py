"""The two ways a step ends early on purpose, and the exit codes they mean."""

EXIT_BAD_INPUT = 2
EXIT_FAILED_BRANCH = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: state is saved, start again to resume


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: where, what, and what to change."""


class Interrupted(Exception):
    """The step was asked to stop, has saved its state, and resumes from there when started again."""


class VariantsFailed(Exception):
    """Some variants of the run failed; their results are missing from the report, which names them."""
