"""Words that this project replaced with the field's own: none comes back, in code, help, charts, reports or docs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [
    *(".ci", ".github", "benchmarks", "charts", "components", "docs", "feyntune", "images", "manifests", "pipelines"),
    "tests",
]
TEXT = re.compile(r"\.(py|md|yaml|yml|tpl|txt|sh|jinja|css|js|ts|tsx|json|toml|ipynb|cff)$|Dockerfile|Makefile")
# Data, other projects' words, and the two files that must name the old ones.
SKIP = re.compile(
    r"^(CHANGELOG\.md|tests/test_words\.py|tests/conftest\.py|tests/recorded/|tests/cluster/custom_objects/|LICENSE|recipes$"
    r"|requirements/|.*(node_modules|__pycache__)/|feyntune/serving/page/|pipelines/compiled/|feyntune/compiled$|feyntune/demo/base/|feyntune/ingestion/synthetic/.*\.yaml"
    r"|tests/ingestion/test_files_of_others\.py|.*package-lock\.json|tests/splitting/reference\.json)"
)
EVERYWHERE, CODE, PROSE = r".", r"\.py$", r"\.(md|jinja|txt|tsx|ipynb)$"

# (old word, the files in which it must not occur, what to write)
WORDS = [
    # names
    (r"(?<![.\w])(found|told|said|mine|theirs|kept|wanted|there) ?(=(?!=)|\+=|:=|\[|\.append)",
     CODE, "the thing that it holds"),
    (r"\bfor \w+, (found|told|said|kept|wanted) in\b", CODE, "the thing that it holds"),
    (r"\bverdict(?!\")", EVERYWHERE, "conclusion (report), gate result, judgment, fail-if-any-failed (step)"),
    (r"\bFinding\b|\bexamine\(", CODE, "Check, run_checks"),
    (r"\bGathered\b|\bChoice\(", CODE, "SystemCompletions, CompletionFilter"),
    (r"\bknobs?\b", EVERYWHERE, "setting"),
    (r"\bset_aside\b|\bin_part\b|\bBook\b", CODE, "archive_partial, partial_path, ScoreStore"),
    (r"\bWORDS\b(?! = \[)|\bloss_words\b|\bGPU_WORDS\b", CODE, "SHINGLE_WORDS, vocab_chunk_size"),
    (r"\bdecisive\b|\bfair_(?!queue)\w+", CODE, "primary_category, truncated_*"),
    (r"\bfailure_as_data\b|\bbudgeted\b|\bbest_device\b|\bcheck_fit\b", CODE, "see the changelog of 0.2.0"),
    (r"\brooms?\b(?! )|\bhouse\b", PROSE, "package, pipeline step"),
    # prose
    (r"\bsealed folders?\b", EVERYWHERE, "artifact"),
    (r"\b(go|goes|went|gone|going) on\b", EVERYWHERE, "resume, continue, keep"),
    (r"\bfor ever\b|\b[oO]f yours\b|\bof one's own\b|\bin any company\b", EVERYWHERE, "forever, your own, existing"),
    (r"\b[mM]end(s|ed|ing)?\b", EVERYWHERE, "fix"),
    (r"\bsurely\b|\bin vain\b|\btaken back\b|\bput back\b", EVERYWHERE, "significantly; timed out; rolled back"),
    (r"\bprove[sdn]?\b|\bproving\b|\bthe proof\b", EVERYWHERE, "check, measure, test"),
    (r"\btrue rest\b|\bbeginnings\b", EVERYWHERE, "reference continuation; prompts"),
    (r"\bas a word each\b|\bwhat it is told\b|\bknowledge ends\b", EVERYWHERE, "plain words"),
    # American spelling
    (r"\b(behaviou?r(?<=our)|\w*colour|\w*flavour|\w*favour|neighbour|honour|harbour)", EVERYWHERE, "-or"),
    (r"\b\w*(memoris|utilis|recognis|optimis|normalis|quantis|tokenis|initialis|serialis|summaris|organis|minimis|maximis)"
     r"(e|es|ed|er|ing|ation)\b", EVERYWHERE, "-ize"),
    (r"\bcatalogues?\b|\blicences?\b|\bartefacts?\b|\bgrey\b|\blearnt\b|\bcentre\b|\banalyse[sd]?\b|\bjudgements?\b",
     EVERYWHERE, "catalog, license, artifact, gray, learned, center, analyze, judgment"),
    (r"\b(un)?labelled\b|\bmodelled\b|\btravell|\bcancell(?!ation|ed|ing)", EVERYWHERE, "labeled, modeled"),
]  # fmt: skip
# Old names that the code still reads or explains, and where.
ALLOWED = {
    ("feyntune/artifacts/artifact.py", "judgement"),
    ("tests/artifacts/test_artifact.py", "judgement"),
    ("feyntune/registry/gate.py", "maximum_memorisation"),
    ("feyntune/registry/gate.py", "memorisation"),
    ("feyntune/registry/register.py", "memorisation"),
    ("tests/registry/test_gate.py", "memorisation"),
    ("tests/registry/test_gate.py", "maximum_memorisation"),
    ("feyntune/evaluation/config.py", "memorised"),
    ("feyntune/training/config.py", "loss_words"),
}


def _files() -> Iterator[str]:
    for folder in ("", *FOLDERS):
        for path in (ROOT / folder).rglob("*") if folder else ROOT.glob("*"):
            name = path.relative_to(ROOT).as_posix()
            if TEXT.search(name) and not SKIP.search(name) and path.is_file():
                yield name


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in _files()}


@pytest.mark.parametrize(("word", "where", "better"), WORDS, ids=[w[2][:40] for w in WORDS])
def test_no_old_word_comes_back(texts: dict[str, str], word: str, where: str, better: str) -> None:
    hits = []
    for name, text in texts.items():
        if not re.search(where, name):
            continue
        for match in re.finditer(word, text):
            if (name, match[0].strip("_")) not in ALLOWED and not any(a == name and w in match[0] for a, w in ALLOWED):
                hits.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    assert not hits, f"write: {better}\n" + "\n".join(hits)
