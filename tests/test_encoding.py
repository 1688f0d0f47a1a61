"""Text files are UTF-8 whatever the locale: every call that opens one says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("feyntune", "components", "pipelines") for p in (ROOT / folder).rglob("*.py"))


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls of open, read_text, write_text and fdopen on text without `encoding`."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) < 2):
            lines.append(node.lineno)
        if name in ("open", "fdopen"):
            owner = getattr(node.func, "value", None)
            if name == "open" and isinstance(owner, ast.Name) and owner.id in ("os", "Registry", "archive"):
                continue
            modes = [k.value for k in node.keywords if k.arg == "mode"]
            modes += node.args[0:1] if method and name == "open" else node.args[1:2]
            binary = any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)
            if not binary:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_is_opened_with_an_encoding(path: Path):
    assert without_encoding(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_check_finds_what_it_looks_for():
    without = "open('a')\np.read_text()\np.write_text(t)\np.open('w')\nos.fdopen(1, 'w')\n"
    given = "open('a', 'rb')\np.read_text(encoding='utf-8')\np.open('wb')\nopen('a', **options)\nos.open('a', 1)\n"
    assert without_encoding(ast.parse(without)) == [1, 2, 3, 4, 5]
    assert without_encoding(ast.parse(given)) == []
