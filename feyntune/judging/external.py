"""Other models as systems to compare: they complete the prompts that the base and the variants completed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, write_artifact
from feyntune.artifacts.completions import CompletionFilter, completions_in, read_completions
from feyntune.errors import UserError
from feyntune.judging import endpoints
from feyntune.judging.endpoints import Answer, Endpoint, Question, archive_partial, is_partial
from feyntune.names import BASE
from feyntune.telemetry import log

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("primary", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("decoding", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),  # null: an endpoint's draws cannot be repeated
        pa.field("temperature", pa.float64()),  # null where it was left to the endpoint
        pa.field("max_new_tokens", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),  # as the endpoint counts them
        pa.field("truncated", pa.string(), nullable=False),
    ]
)

INSTRUCTION = (
    "You continue abstracts of scientific papers. The user gives the first part of an abstract. Write the rest of it: "
    "one paragraph in the same style and notation (LaTeX where the abstract has it). Write the continuation only: do "
    "not repeat the given text, and add no title, heading or comment."
)


class AskConfig(BaseModel):
    """Which prompts are completed.

    Attributes:
        rule, split: see feyntune.artifacts.completions.CompletionFilter.
        papers: how many; always the same ones, those of a smaller number among them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["paper", "careful"] = "paper"
    split: Literal["test", "holdout"] = "test"
    papers: int = Field(100, ge=1)


def ask(
    evaluation: str | Path, systems: Sequence[Endpoint], out: str | Path, config: AskConfig | None = None
) -> Manifest:
    """Have endpoints complete what `evaluation` completed, into a sealed `answers`: `completions/NAME.parquet`.

    Papers an endpoint gave no answer for, and those after its cap, are left out; the manifest's stats say how many.

    Args:
        evaluation: a sealed `evaluation` with completions of the base.

    Raises:
        UserError: no completions there, an endpoint that does not work, or `out` holds something else.
        Interrupted: stopped; the answers there are were kept.
    """
    config = config or AskConfig()
    out = Path(out)
    taken = completions_in(open_artifact(evaluation))
    for system in systems:
        if system.name in taken:
            raise UserError(f"Endpoint {system.name} has the name of a measured system: give it another.")
    if BASE not in taken:
        raise UserError(f"{evaluation} holds no completions of the base: give an evaluation that does.")
    decoding = pq.read_table(Path(evaluation) / taken[BASE], columns=["decoding"])["decoding"].to_pylist()
    filter = CompletionFilter(
        rule=config.rule, split=config.split, decoding="sampled" if "sampled" in decoding else "greedy"
    )  # prompts are the same for both
    given = read_completions([evaluation], filter)
    inputs = {"test": given.test, "prompts": given.digests[BASE]}
    stored = {**config.model_dump(mode="json"), "systems": {s.name: s.public() for s in systems}}
    if (out / MANIFEST).is_file():
        done = open_artifact(out, "answers")
        if (done.inputs, done.config) != (inputs, stored):
            raise UserError(f"{out} holds answers to other questions: choose another folder.")
        if not any(is_partial(done.stats[s.name]) for s in systems):
            return done
        archive_partial(out)
    chosen = sorted(given.first(config.papers))
    questions = [Question(INSTRUCTION, given.papers[i].prompt) for i in chosen]
    with write_artifact(out, "answers", inputs, stored) as folder:
        (folder.path / "completions").mkdir()
        for system in systems:
            answers = endpoints.ask(system, questions, out.parent)
            rows = [
                _row(system, config, i, given.papers[i], answer)
                for i, answer in zip(chosen, answers.answers, strict=True)
                if answer is not None
            ]
            if not rows:
                why = answers.stopped or next(iter(answers.failures.values()))
                raise UserError(f"Endpoint {system.name} gave no completion ({why}).")
            table = pa.Table.from_pylist(rows, SCHEMA)
            pq.write_table(table, folder.path / "completions" / f"{system.name}.parquet")
            folder.stats[system.name] = answers.stats()
            for reason, count in answers.stats()["reasons"].items():
                log.warning("%s: %d papers without a completion: %s", system.name, count, reason)
            log.info("%s: %d of %d completions, %.4g spent", system.name, len(rows), len(chosen), answers.spent)
    return open_artifact(out, "answers")


def _row(system: Endpoint, config: AskConfig, identifier: str, passage: Any, answer: Answer) -> dict[str, Any]:
    completion = answer.text
    if completion.strip().startswith(passage.prompt):  # some chat models begin by repeating what they were given
        completion = completion.strip()[len(passage.prompt) :]
    if system.api == "chat" and completion and not completion[0].isspace():
        completion = " " + completion
    return {
        "id": identifier,
        "primary": passage.primary,
        "split": config.split,
        "rule": config.rule,
        "decoding": "greedy" if system.temperature == 0 else "sampled",
        "seed": None,
        "temperature": system.temperature,
        "max_new_tokens": system.max_tokens,
        "prompt": passage.prompt,
        "reference": passage.reference,
        "completion": completion,
        "stop_reason": {"stop": "eos", "length": "length"}.get(answer.finish, "stop"),
        "n_tokens": answer.tokens_out,
        "truncated": truncate(completion, passage.reference),
    }


def truncate(completion: str, reference: str) -> str:
    """`completion` up to its first blank line, and to as many words as `reference` has.

    Words stand for the tokens the measured systems are cut by: an endpoint's tokens are its own.
    """
    pieces = re.split(r"\n[^\S\n]*\n", completion.lstrip("\n"))[0].split(" ")
    pieces_within: list[str] = []
    left = len(reference.split())
    for piece in pieces:
        if piece.strip():
            if left == 0:
                break
            left -= 1
        pieces_within.append(piece)
    return " ".join(pieces_within).rstrip()
