"""The `feyntune` command: its parts by who uses them, and what its exit codes mean."""

import sys

import typer

from feyntune.artifacts.names import expand
from feyntune.cli import cluster, doctor, human, registry, run, serve, steps, tasks
from feyntune.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED_BRANCH,
    EXIT_INTERRUPTED,
    Interrupted,
    UserError,
    write_failure,
)
from feyntune.extras import missing_extra

EXIT_CODES = {
    0: "done",
    1: "unexpected error, with its traceback; or `doctor` found something missing",
    EXIT_BAD_INPUT: "invalid input, with the reason",
    EXIT_FAILED_BRANCH: "a step or a variant of the run failed; the report has the others",
    EXIT_INTERRUPTED: "interrupted, progress saved: run the same command to resume",
}

# Without rich's markup, whose import would take longer than everything else in `--help`.
app = typer.Typer(
    help="Domain-adapted language models from arXiv abstracts, behind one endpoint.\n\n"
    "Start with `feyntune run`; `feyntune doctor` lists what is missing on this machine.\n\nExit codes: "
    + ". ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())
    + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (run, steps, tasks, serve, registry, cluster, human, doctor):
    app.add_typer(part.app)
app.add_typer(registry.registry_app, name="registry")
app.add_typer(human.study_app, name="study")


def _home_expanded(argument: str) -> str:
    """`--workdir=~/runs` as its writer means it: shells expand the `~` of a word of its own only."""
    option, equals, value = argument.partition("=")
    return f"{option}={expand(value)}" if equals and option.startswith("--") and value.startswith("~") else argument


def main() -> None:
    try:
        app([_home_expanded(argument) for argument in sys.argv[1:]])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Interrupted as e:
        print(f"interrupted: {str(e).rstrip('.')}. Run the same command to resume.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as e:
        missing = missing_extra(e, sys.argv[1] if len(sys.argv) > 1 else "")
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Exception as e:
        if (sentence := write_failure(e)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
