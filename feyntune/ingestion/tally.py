"""What was read, kept, left out and refused: the figures of `counts.json`."""

from collections import Counter
from typing import Any

from feyntune.errors import UserError

OTHER_CATEGORY = "other primary category"
AFTER_CUT_OFF = "first submitted after the cut-off"
REPEATED = "older record of a paper met again"
REPLACEMENT = "replacement of an older paper, without the date of version 1"
DELETED = "deleted by the source"

_EXAMPLES = 5  # of each reason
_HOPELESS = 1000  # records after which a source that is mostly bad is given up


class Tally:
    """Counts while a source is read."""

    def __init__(self) -> None:
        self.read = 0
        self.left_out: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.others: list[str] = []  # a few of the categories that were not asked for

    def other(self, category: str, count: int = 1) -> None:
        """Count papers of a category that was not asked for."""
        if count:
            self.left_out[OTHER_CATEGORY] += count
        if len(self.others) < _EXAMPLES and category and category not in self.others:
            self.others.append(category)

    def bad(self, where: str, reason: str) -> None:
        """Count a record that cannot be used; `where` is FILE:LINE or the like.

        Raises:
            UserError: of a thousand records or more most are bad, so the source is not what it was taken for.
        """
        self.refused[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(where)
        bad = self.refused.total()
        if self.read >= _HOPELESS and bad > self.read // 2:
            raise UserError(f"{bad} of the first {self.read} records are bad ({self.worst()}): check the source.")

    def check(self, max_bad: float) -> None:
        """Raises UserError if more than the share `max_bad` of what was read is bad."""
        bad = self.refused.total()
        if bad > max_bad * self.read:
            raise UserError(
                f"{bad:,} of {self.read:,} records are bad, more than the {max_bad:.2%} allowed ({self.worst()}): "
                "repair the source, or allow more with --max-bad (on Kubeflow the parameter max_bad)."
            )

    def worst(self) -> str:
        """The commonest reason, with the places it was met first."""
        reason = self.refused.most_common(1)[0][0]
        return f"{reason}: {', '.join(self.examples[reason])}"

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "left_out": dict(sorted(self.left_out.items())),
            "refused": {
                reason: {"count": count, "examples": self.examples[reason]}
                for reason, count in sorted(self.refused.items())
            },
        }
