"""Commands on the registry: what is registered, and what is served."""

import json
from typing import Annotated, Any

import typer

from feyntune.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    Json,
    Out,
    RegistryUri,
    VersionName,
    is_missing,
    print_result,
    print_table,
    setup_logging,
    warn,
)
from feyntune.errors import UserError

app = typer.Typer()
registry_app = typer.Typer(help="List, inspect and export registered adapters.", no_args_is_help=True)


def open_registry(uri: str) -> Any:
    """The registry at `uri`.

    Raises:
        UserError: it is a folder that does not exist.
    """
    require_registry(uri)
    from feyntune.registry.registry import Registry

    return Registry.open(uri)


def require_registry(uri: str) -> None:
    """Raise UserError where `uri` is a folder that does not exist."""
    if is_missing(uri):
        raise UserError(f"There is no registry at {uri}: `feyntune run` makes one, or name yours with --registry.")


@app.command(epilog="Example: feyntune promote hep-th/lora-qkv --registry s3://feyntune/registry")
def promote(
    name: VersionName, registry: RegistryUri = DEFAULT_REGISTRY, alias: Alias = "champion", as_json: Json = False
) -> None:
    """Put a version that passed the gate into production; endpoints follow without a restart."""
    setup_logging(quiet=as_json)
    opened = open_registry(registry)
    before = opened.snapshot()
    version = opened.promote(name, alias)
    print_result(version.model_dump(mode="json"), as_json, _changes(before, opened.snapshot()))


@app.command(epilog="Example: feyntune rollback --registry s3://feyntune/registry")
def rollback(registry: RegistryUri = DEFAULT_REGISTRY, alias: Alias = "champion", as_json: Json = False) -> None:
    """Return an alias to the version that held it before; the current one leaves production."""
    setup_logging(quiet=as_json)
    opened = open_registry(registry)
    before = opened.snapshot()
    version = opened.rollback(alias)
    shown = version.model_dump(mode="json") if version else {}  # the first champion leaves none behind
    print_result(shown, as_json, _changes(before, opened.snapshot()))


def _changes(before: Any, after: Any) -> str:
    """What a decision moved: aliases and stages, one line each."""
    lines = []
    for alias in sorted({*before.aliases, *after.aliases}):
        old, new = before.aliases.get(alias), after.aliases.get(alias)
        if old != new:
            lines.append(f"{alias} is now {new or 'unset'}" + (f" (was {old})" if old else ""))
    for name, version in after.versions.items():
        old_stage = before.versions[name].stage if name in before.versions else None
        if old_stage != version.stage:
            lines.append(f"{name} is now in {version.stage}" + (f" (was in {old_stage})" if old_stage else ""))
    return "\n".join(lines) or "Nothing changed."


@registry_app.command("ls", epilog="Example: feyntune registry ls --registry s3://feyntune/registry")
def registry_ls(registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """List all versions: stage, measured difference to the base, aliases."""
    setup_logging(quiet=as_json)
    from feyntune.registry.registry import Registry

    if is_missing(registry):
        warn(f"there is no registry at {registry}: nothing is registered there yet.")
    state = Registry.open(registry).snapshot()
    if as_json:
        versions = [v.model_dump(mode="json") for v in state.versions.values()]
        print(json.dumps({"versions": versions, "aliases": state.aliases}))
        return
    rows = []
    for v in state.versions.values():
        delta = v.measured.delta
        how = v.measured.conditions
        measured = f"{how.precision if how else 'unknown'}, test {v.measured.test[:8]}"
        rows.append([v.name, v.stage, f"{delta.mean:+.2f} [{delta.low:+.2f}, {delta.high:+.2f}]", measured])
    if not rows:
        print("No version is registered.")
        return
    print_table(rows, ["version", "stage", "minus base [95 % CI]", "measured"])
    for line in _incomparable(state):
        print(line)
    if state.aliases:
        print()
        print_table([[alias, name] for alias, name in sorted(state.aliases.items())], ["alias", "version"])


def _incomparable(state: Any) -> list[str]:
    """A sentence for each served version whose figures do not compare with the champion's."""
    from feyntune.conditions import differences

    champion = state.versions.get(state.aliases.get("champion"))
    lines = []
    for v in state.served if champion else []:
        if v.name != champion.name and (unlike := differences(v.measured.conditions, champion.measured.conditions)):
            lines.append(f"{v.name} does not compare with the champion: measured in another {', '.join(unlike)}.")
    return lines


@registry_app.command("show", epilog="Example: feyntune registry show champion")
def registry_show(name: VersionName, registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """Show one version: its lineage, the gate's result, and its model card."""
    setup_logging(quiet=as_json)
    opened = open_registry(registry)
    version = opened.resolve(name)
    print_result(version.model_dump(mode="json"), as_json, opened.card(version.name))


@registry_app.command("history", epilog="Example: feyntune registry history")
def registry_history(registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """Show the registry's event log, oldest first, including rejected events."""
    setup_logging(quiet=as_json)
    entries = open_registry(registry).history()
    if as_json:
        print(json.dumps([e.model_dump(mode="json") for e in entries]))
        return
    for e in entries:
        names = ", ".join([v.name for v in e.event.add] or e.event.versions)
        moves = ", ".join(f"{alias}: {m.old or 'unset'} -> {m.new or 'unset'}" for alias, m in e.event.moves.items())
        note = f"  (rejected: {e.rejected})" if e.rejected else ""
        print(f"{e.event.time[:19]} {e.event.kind:9} {names}  {moves}{note}")


@registry_app.command("diff", epilog="Example: feyntune registry diff champion previous")
def registry_diff(
    one: VersionName, other: VersionName, registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False
) -> None:
    """Show where two versions differ."""
    from feyntune.registry.replay import diff

    setup_logging(quiet=as_json)
    opened = open_registry(registry)
    differences = diff(opened.resolve(one), opened.resolve(other))
    lines = [f"{field}:\n  {_short(a)}\n  {_short(b)}" for field, (a, b) in differences.items()]
    print_result({k: list(v) for k, v in differences.items()}, as_json, "\n".join(lines) or "No difference.")


def _short(value: Any) -> str:
    """A value on one line; digests by their first digits, as the versions' names show them."""
    import re

    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", text)


@registry_app.command("export", epilog="Example: feyntune registry export champion --out my-adapter")
def registry_export(
    name: VersionName, out: Out, registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False
) -> None:
    """Write a version as a folder that PEFT loads."""
    setup_logging(quiet=as_json)
    version = open_registry(registry).export(name, out)
    print_result({"folder": str(out), "version": version.name}, as_json, f"{out}: {version.name}")


@registry_app.command("backup", epilog="Example: feyntune registry backup s3://backups/feyntune-registry")
def registry_backup(
    target: Annotated[str, typer.Argument(help="Target: a folder or s3://BUCKET/PREFIX.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Copy the registry; run it again to add what is new. Others may write meanwhile."""
    require_registry(registry)
    from feyntune.registry.maintenance import copy_registry

    setup_logging(quiet=as_json)
    events = copy_registry(registry, target)
    print_result({"events": events, "target": target}, as_json, f"{events} events were copied to {target}.")


@registry_app.command("restore", epilog="Example: feyntune registry restore s3://backups/feyntune-registry")
def registry_restore(
    source: Annotated[str, typer.Argument(help="The backup: a folder or s3://BUCKET/PREFIX.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Copy a backup to the registry's address, which must be empty or an older state of it."""
    from feyntune.registry.maintenance import restore_registry

    setup_logging(quiet=as_json)
    events = restore_registry(source, registry)
    print_result({"events": events, "registry": registry}, as_json, f"{events} events were copied to {registry}.")


@registry_app.command("fsck", epilog="Example: feyntune registry fsck --files")
def registry_fsck(
    files: Annotated[bool, typer.Option("--files", help="Also read every adapter and card.")] = False,
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Check events, adapters, cards and champions; exit with 1 if anything is wrong."""
    require_registry(registry)
    from feyntune.registry.maintenance import check_registry

    setup_logging(quiet=as_json)
    problems = check_registry(registry, files)
    print_result({"problems": problems}, as_json, "\n".join(problems) or "Nothing is wrong.")
    if problems:
        raise typer.Exit(1)


@registry_app.command("gc", epilog="Example: feyntune registry gc --dry-run")
def registry_gc(
    days: Annotated[float, typer.Option(help="Keep what was archived or written in the last days.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the folders, delete nothing.")] = False,
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Delete the files of archived versions and folders that no event names. The history stays."""
    require_registry(registry)
    from feyntune.registry.maintenance import remove_unused

    setup_logging(quiet=as_json)
    removed = remove_unused(registry, days, dry_run)
    print_result({"folders": removed, "deleted": not dry_run}, as_json, "\n".join(removed) or "Nothing to delete.")
