"""Run the compiled suite on this machine: the same YAML a cluster runs, its steps as processes, a folder as store.

WORKDIR/base/       the tiny base model, a copy of the shipped one
        store/      checkpoints, adapters, scores; what was finished is not computed again
        registry/   what may be served
        steps/      what passes between steps, and Kubeflow's cache of finished ones
        RUN/        summary.json, report.html, table.md, run.log of one run, and links to its evaluations
        latest      link to the newest RUN that has a report
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from feyntune.artifacts.names import local_file
from feyntune.demo import copy_demo_base
from feyntune.errors import Interrupted, UserError
from feyntune.evaluation.retention import absolute_sources
from feyntune.ingestion.fields import parse_day
from feyntune.keys import variant_keys
from feyntune.kubeflow.adapt import COMPILED
from feyntune.kubeflow.preflight import check_input, refuse_null
from feyntune.kubeflow.run_view import RunView
from feyntune.kubeflow.source_check import check_source
from feyntune.kubeflow.step_runner import Runner, steps_by
from feyntune.model.base import check_base, pin_base
from feyntune.names import BASE, slug
from feyntune.recipe import check_recipe, merge, read_recipe
from feyntune.telemetry import ERROR, log
from feyntune.variants import load_mixtures

TINY_RECIPE = read_recipe(default="tiny")
CATEGORIES = ["hep-th", "hep-ph", "gr-qc", "q-bio", "cs"]  # what the ten mixtures draw from, as in the pipelines


class RunFailed(Exception):
    """The pipeline failed; the message says why and where the log is.

    `reported` says whether it got as far as a report, which then has the variants that did not fail.
    """

    def __init__(self, message: str, reported: bool):
        super().__init__(message)
        self.reported = reported


def run(
    source: str,
    variants: list[str],
    workdir: Path,
    *,
    until: str = "",
    after: str = "",
    categories: list[str] | None = None,
    mixtures: list[dict[str, Any]] | None = None,
    max_bad: float = 0.001,
    converted_text: bool = False,
    base: str | None = None,
    recipe: dict[str, Any] | None = None,
    devices: int = 1,
    serving: dict[str, Any] | None = None,
) -> Path:
    """Run the suite over `source` for `variants`; returns the run's folder.

    Args:
        variants: names; with mixtures of your own, an empty list takes all of theirs.
        categories: primary categories to ingest; those the mixtures draw from by default.
        mixtures: mixtures in place of the ten of variants.yaml, as its part `mixtures` has them. Their categories are
            then what is scored, unless `recipe` names others.
        max_bad: share of unusable records above which the run stops.
        converted_text: accept a source whose server turns TeX into Unicode (the Atom API).
        base: a base model; the tiny one, which is shipped, by default.
        recipe: settings of training and evaluation (`{"train": {…}, "evaluate": {…}}`); without `base`, merged over
            TINY_RECIPE.
        serving: what to deploy at the end (fields of feyntune.deployment.deploy.ServingSpec); nothing by default.

    Raises:
        UserError: bad input, found before anything is made.
        Interrupted: Ctrl-C; the same command resumes.
        RunFailed: a step or a variant failed; the other variants' results and the report are there.
    """
    recipe = recipe or {}
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file: give a folder.")
    refuse_null(recipe, "recipe")
    refuse_null(serving or {}, "serving")
    if base is None:
        recipe = merge(TINY_RECIPE, recipe)
    recipe = absolute_sources(recipe)
    source, workdir = _absolute(source), workdir.resolve()
    registry = (workdir / "registry").as_uri()
    days = {"until": until, "after": after}
    if mixtures:
        parts = [*dict.fromkeys(part for m in load_mixtures(mixtures) for part in m.parts)]
        categories = categories or parts
        scored = recipe.get("evaluate", {}).get("categories")
        if scored in (None, TINY_RECIPE["evaluate"]["categories"]):
            recipe = merge(recipe, {"evaluate": {"categories": parts}})
    categories = categories or CATEGORIES
    variants = check_input(
        source, variants, base or "", recipe, devices, registry, serving, days, categories, mixtures, max_bad
    )
    if base is not None:
        base = pin_base(base)
        check_base(base)
    check_source(
        source,
        load_mixtures(mixtures or None),
        {name.rpartition("/")[0] for name in variants},
        check_recipe(recipe)[1].categories,
        categories=categories,
        until=parse_day("until", until or None),
        after=parse_day("after", after or None),
        max_bad=max_bad,
        converted_text=converted_text,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    with _only_run(workdir):
        folder = workdir / datetime.now().strftime("%Y%m%d-%H%M%S")
        folder.mkdir()
        arguments = {
            "source": source,
            "until": until,
            "after": after,
            "categories": categories,
            "mixtures": mixtures or [],
            "max_bad": max_bad,
            "converted_text": converted_text,
            "variants": variants,
            "base": base or str(copy_demo_base(workdir / "base")),
            "recipe": recipe,
            "devices": devices,
            "store": (workdir / "store").as_uri(),
            "registry": registry,
            "serving": serving or {},
        }
        steps = workdir / "steps"
        before = _runs_in(steps)
        failure = _execute(arguments, steps, workdir / "store", folder / "run.log")
        # No folder is new when the first step failed; an older run's must not be taken for this one's.
        for new in _runs_in(steps) - before:
            _collect(new, folder, arguments)
        reported = (folder / "summary.json").exists()
        if reported:
            latest = workdir / "latest"
            latest.unlink(missing_ok=True)
            _link(latest, Path(folder.name))
    if failure:
        raise RunFailed(f"{failure} The whole log is {folder / 'run.log'}.", reported)
    return folder


@contextlib.contextmanager
def _only_run(workdir: Path) -> Iterator[None]:
    """Hold the workdir for one run at a time; let go when this process ends, however it ends."""
    with (workdir / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"Another run is using {workdir}: wait for it, or give --workdir another folder.") from e
        except OSError as e:  # Lustre without -o flock, NFS without lockd
            log.warning("%s has no file locks (%s): start only one run at a time in it", workdir, e.strerror)
        yield


def _absolute(source: str) -> str:
    """Steps run in other folders, so a file is named by its whole path."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{local_file(rest).resolve()}" if kind in ("kaggle", "atom", "jsonl") else source


def _execute(arguments: dict[str, Any], steps: Path, store: Path, log_file: Path) -> str | None:
    """Run compiled/suite.yaml; returns what failed, or None. Everything printed goes to `log_file`."""
    with warnings.catch_warnings(), _environment_of_steps():
        warnings.simplefilter("ignore")  # settings that only a cluster honors: accelerators, node selectors, …
        from kfp import components, local

        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(steps),
            raise_on_error=True,
            enable_caching=True,
            cache_root=str(steps / ".cache"),
        )
        pipeline = components.load_component_from_text(
            _without_retries((COMPILED / "suite.yaml").read_text(encoding="utf-8"))
        )
        view = RunView(arguments["variants"])
        with log_file.open("w", buffering=1, encoding="utf-8") as out:
            root, handler = logging.getLogger(), logging.StreamHandler(out)
            before = root.handlers
            root.handlers = [handler]
            runner = Runner(out, view, train_expected=not (store / "evaluations").is_dir())

            def interrupt(signum: int, frame: Any) -> None:
                log.warning("interrupted: the running steps save their state and exit")
                runner.stop()
                raise KeyboardInterrupt

            previous = signal.signal(signal.SIGINT, interrupt)
            try:
                with view.shown(), steps_by(runner), contextlib.redirect_stdout(out):
                    pipeline(**arguments)
            except KeyboardInterrupt:
                raise Interrupted("finished steps are saved") from None
            except RuntimeError as e:
                failure = str(e)
            else:
                return None
            finally:
                root.handlers = before
                signal.signal(signal.SIGINT, previous)
    return _why(log_file) or failure


@contextlib.contextmanager
def _environment_of_steps() -> Iterator[None]:
    """What the steps inherit. It is taken away afterward: this process may be somebody's notebook."""
    before = dict(os.environ)
    # The steps mark their own lines, which are shown as they come, and end when this process is gone.
    os.environ["FEYNTUNE_RUN_PID"] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONSAFEPATH"] = "1"  # a step must not import a package that lies in the user's own folder
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _without_retries(text: str) -> str:
    """A cluster retries what its nodes break; on this machine a step that failed fails again."""
    documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    for dag in [documents[0]["root"], *documents[0]["components"].values()]:
        for task in dag.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return str(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))


def _why(log_file: Path) -> str | None:
    """The last error a step printed: its one sentence, or the message of its exception."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    sentences = re.findall(rf"(?:^|\s){ERROR}(.+)$", text, re.MULTILINE)
    if sentences:
        return str(sentences[-1])
    messages = re.findall(r"^\s*[\w.]+(?:Error|Failed): (.+)$", text, re.MULTILINE)
    return str(messages[-1]) if messages else None


def _runs_in(steps: Path) -> set[Path]:
    """The folders that Kubeflow's local runner made, one for each run of the pipeline."""
    return set(steps.glob("feyntune-suite-*"))


def _collect(steps: Path, folder: Path, arguments: dict[str, Any]) -> None:
    """Put the run's report, tables and summary into its own folder, as far as the steps got."""
    for comparison in steps.glob("compare*/comparison"):
        for name in ("report.html", "table.md", "table.csv", "completions.csv"):
            if (comparison / name).is_file():  # completions can be left out
                shutil.copyfile(comparison / name, folder / name)
        summary = json.loads((comparison / "summary.json").read_text(encoding="utf-8"))
        for registration in steps.glob("register*/registration/registration.json"):
            _add_registration(summary, json.loads(registration.read_text(encoding="utf-8")))
        summary["arguments"] = arguments
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        _link_evaluations(folder, summary, arguments["recipe"])


def _link_evaluations(folder: Path, summary: dict[str, Any], recipe: dict[str, Any]) -> None:
    """evaluations/NAME: where scores and completions of the base and of every variant lie in the store."""
    links = folder / "evaluations"
    links.mkdir()
    for name in [BASE, *summary["variants"]]:
        _, branch = variant_keys(summary["split"]["digest"], f"base@{summary['base']['digest']}", recipe, name)
        evaluation = Path("..", "..", "store", branch, "evaluation")
        if (links / evaluation).is_dir():  # of a variant with several seeds each training has its own
            _link(links / slug(name), evaluation)


def _link(link: Path, target: Path) -> None:
    """A convenience that a finished run does not fail for: exFAT and some network file systems have no links."""
    try:
        link.symlink_to(target)
    except OSError as e:
        log.warning("no link %s to %s can be made here (%s)", link, target, e.strerror)


def _add_registration(summary: dict[str, Any], registration: dict[str, Any]) -> None:
    """What the gate decided, beside what was measured."""
    summary["champion"] = registration["champion"]
    for name, decided in registration["variants"].items():
        summary["variants"][name]["promoted"] = decided["promoted"]
        summary["variants"][name]["gate"] = decided["reasons"]
        summary["variants"][name]["champion"] = decided["champion"]  # this version, not an older one of the variant
