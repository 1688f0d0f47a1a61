"""Writes the inputs and outputs into components/*/README.md from the components: `python docs/components.py`."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `python docs/components.py` reads this tree
START = "<!-- Made by docs/components.py from component.py. -->\n"
END = "<!-- End of the generated part. -->\n"


def steps() -> list[str]:
    """Names of the folders that hold a component."""
    return sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))


def readme(step: str) -> str:
    """The README of a step with its generated part renewed."""
    head, _, rest = (ROOT / "components" / step / "README.md").read_text().partition(START)
    _, end, tail = rest.partition(END)
    assert end, f"components/{step}/README.md has no generated part: write both comments into it"
    return f"{head}{START}\n{_tables(step)}\n{END}{tail}"


def _tables(step: str) -> str:
    from kfp.dsl.base_component import BaseComponent

    module = import_module(f"components.{step}.component")
    components = [value for value in vars(module).values() if isinstance(value, BaseComponent)]
    return "\n".join(_table(component, len(components) > 1) for component in components)


def _table(component: Any, several: bool) -> str:
    from docstring_parser import parse

    spec = component.component_spec
    described = parse(component.python_func.__doc__)
    meanings = {p.arg_name: _sentence(p.description) for p in described.params}
    meanings["Output"] = _sentence(described.returns.description) if described.returns else ""
    text = f"### `{spec.name}`\n\n" if several else ""
    text += f"{described.short_description} Image: `{spec.implementation.container.image}`.\n\n"
    text += "| input | type | default | meaning |\n|---|---|---|---|\n"
    for name, entry in (spec.inputs or {}).items():
        default = f"`{entry.default!r}`" if entry.optional else "required"
        text += f"| `{name}` | {_type(entry.type)} | {default} | {meanings[name]} |\n"
    if spec.outputs:
        text += "\n| output | type | meaning |\n|---|---|---|\n"
        for name, output in spec.outputs.items():
            text += f"| `{name}` | {_type(output.type)} | {meanings[name]} |\n"
    return text


def _sentence(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words[:1].upper() + words[1:]


def _type(name: str) -> str:
    """`system.Dataset@0.0.1` as Dataset and `typing.List[str]` as List[str], the names in Kubeflow's SDK."""
    return name.removeprefix("system.").removeprefix("typing.").partition("@")[0]


if __name__ == "__main__":
    for step in steps():
        (ROOT / "components" / step / "README.md").write_text(readme(step))
