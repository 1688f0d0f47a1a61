"""Completions of the prompts of abstracts by every system, and what is measured on them.

All systems are completed by one engine (feyntune.engine.api), those of different adapters in the same batch.
Each shard of papers is written as soon as it is complete, so an interrupted evaluation resumes from it. A prompt is BOS
and the text, as a document begins in training, and never ends in EOS.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import sha256_json
from feyntune.errors import UserError
from feyntune.evaluation.config import CompletionsConfig, primary_category
from feyntune.evaluation.overlap import longest_overlaps
from feyntune.evaluation.prompts import cut, sample_papers
from feyntune.evaluation.repetition import DEFINITIONS, repetition
from feyntune.evaluation.shards import read_shard, write_shard
from feyntune.names import BASE
from feyntune.telemetry import log, progress

MADE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("primary", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # test, or holdout
        pa.field("rule", pa.string(), nullable=False),  # where the prompt ends: paper, careful
        pa.field("decoding", pa.string(), nullable=False),  # sampled, greedy
        pa.field("seed", pa.int64()),  # the setting; null when greedy
        pa.field("temperature", pa.float64()),  # null when greedy
        pa.field("max_new_tokens", pa.int64(), nullable=False),  # as far as this prompt leaves room for
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),  # reference continuation
        pa.field("completion", pa.string(), nullable=False),  # all that was written, white space at its start kept
        pa.field("stop_reason", pa.string(), nullable=False),  # eos, or length
        pa.field("n_tokens", pa.int64(), nullable=False),  # of the completion, without EOS
        pa.field("truncated", pa.string(), nullable=False),  # the completion up to truncation
        pa.field("truncated_by", pa.string(), nullable=False),  # blank line, reference length, or what ended it before
        pa.field("truncated_tokens", pa.int64(), nullable=False),
        pa.field("request_seed", pa.int64()),  # what the engine was given for this paper
    ]
)
# Of the whole completion, and prefixed `truncated_` of its truncated part. Floats, null where there is none.
MEASURES = ["similarity", "similarity_with_prompt", *DEFINITIONS, "overlap"]
SCHEMA = pa.schema(
    [
        *MADE,
        *(pa.field(f"{prefix}{m}", pa.float64()) for prefix in ("", "truncated_") for m in MEASURES),
        pa.field(
            "reference_overlap", pa.float64(), nullable=False
        ),  # reference continuation's own, with the same papers
    ]
)
SERVED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("nll", pa.list_(pa.float32()), nullable=False),  # nats, of every token of the text after BOS
        pa.field("lora", pa.string(), nullable=False),  # what the adapter was computed in
    ]
)
SHARD = 32  # papers between two writes


@dataclass(frozen=True)
class Prompt:
    """A prompt from an abstract, and its reference continuation."""

    id: str
    primary: str
    split: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class Loaded:
    """A base model ready to generate ("sdpa" attention, no adapter in it), its tokenizer, and what ends a text."""

    model: Any
    tokenizer: Any
    eos: list[int]


def prompts(papers: pa.Table, categories: list[str], config: CompletionsConfig) -> list[Prompt]:
    """What is to be completed, sorted by id: of `papers` (as evaluate.test_papers) those of the primary category.

    An abstract of a single word leaves nothing to complete and is passed over.
    """
    category = primary_category(categories)
    if category is not None:
        in_category = [p == category or p.partition(".")[0] == category for p in papers["primary"].to_pylist()]
        papers = papers.filter(pa.array(in_category, pa.bool_()))
    papers = papers.filter(pa.array([" " in a for a in papers["abstract"].to_pylist()], pa.bool_()))
    result = []
    for split, most in (("test", config.papers), ("holdout", config.holdout_papers)):
        for p in sample_papers(papers.filter(pc.equal(papers["split"], split)), most).to_pylist():
            result.append(Prompt(p["id"], p["primary"], split, *cut(p["abstract"], config.rule)))
    return sorted(result, key=lambda p: p.id)


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """BOS and the text, exactly as a document begins in training; no EOS."""
    from feyntune.model.load import encode, prompt

    tokens = prompt(tokenizer, text)
    assert tokens == encode(tokenizer, text)[:-1], "a prompt must begin as a document in training does"
    assert tokens[0] == tokenizer.bos_token_id, "a prompt begins with BOS"
    assert tokens[-1] != tokenizer.eos_token_id, "a prompt does not end in EOS"
    return tokens


def request_seed(seed: int, paper: str) -> int:
    """The seed of one paper's samples: of `seed` and the paper's id alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{paper}".encode()).digest()[:8]) >> 1


class Completer:
    """Completes `prompts` with every system; shards lie in `folder` until `shards` are removed.

    Args:
        key: what decides the completions apart from `config` and the adapter: base, precision.
        load: gives the base model; called only if something is left to complete.
        sample: (id, text) to be scored by the engine too, as the endpoint would: `served`, by system, holds SERVED.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        config: CompletionsConfig,
        folder: Path,
        key: Mapping[str, Any],
        load: Callable[[], Loaded],
        sample: Sequence[tuple[str, str]] = (),
    ):
        self.prompts, self.config, self.folder, self.key, self.load = list(prompts), config, folder, key, load
        self.sample = list(sample)
        self.served: dict[str, pa.Table] = {}
        self.shards: list[Path] = []
        self.resumed = 0

    def complete(
        self, systems: Sequence[str], adapters: Mapping[str, str | Path], digests: Mapping[str, str]
    ) -> dict[str, pa.Table]:
        """Rows of MADE by system, sorted by id and decoding.

        Papers whose prompt alone fills the base's context are left out, for every system alike.

        Raises:
            UserError: none is left.
        """
        how = self.config.model_dump(include={"rule", "temperature", "top_p", "max_new_tokens", "seed"})
        asked = [[p.id, p.prompt, p.reference] for p in self.prompts]
        pieces: dict[tuple[str, str, int], pa.Table] = {}
        missing: dict[tuple[str, str, int], Path] = {}
        unscored: dict[str, Path] = {}
        for system in systems:
            key = {**self.key, **how, "asked": asked, "sample": self.sample, "adapter": digests.get(system)}
            shards = self.folder / f".completions-{sha256_json(key)[:16]}"
            shards.mkdir(parents=True, exist_ok=True)
            self.shards.append(shards)
            served = read_shard(shards / "served.parquet", SERVED, len(self.sample))
            if served is None:
                unscored[system] = shards / "served.parquet"
            else:
                self.served[system] = served
            for decoding in self.config.decodings:
                for start in range(0, len(self.prompts), SHARD):
                    path = shards / f"{decoding}-{start:06d}.parquet"
                    table = read_shard(path, MADE, len(self.prompts[start : start + SHARD]))
                    if table is None:
                        missing[system, decoding, start] = path
                    else:
                        pieces[system, decoding, start] = table
                        self.resumed += 1
        if missing or unscored:
            needed = {*(system for system, _, _ in missing), *unscored} - {BASE}
            made = asyncio.run(self._make(missing, unscored, {name: Path(adapters[name]) for name in sorted(needed)}))
            pieces |= made
        order = [("id", "ascending"), ("decoding", "ascending")]
        result = {}
        for system in systems:
            table = pa.concat_tables([t for (of, _, _), t in pieces.items() if of == system]).sort_by(order)
            result[system] = table.filter(pc.greater(table["max_new_tokens"], 0))
            if not result[system].num_rows:
                raise UserError(
                    "Every prompt fills the base's context: use a base with a longer one, or no completions."
                )
        return result

    async def _make(
        self,
        missing: Mapping[tuple[str, str, int], Path],
        unscored: Mapping[str, Path],
        adapters: Mapping[str, Path],
    ) -> dict[tuple[str, str, int], pa.Table]:
        """Everything that is missing in one engine; a shard is written when the last of its papers is there."""
        from feyntune.engine.api import EngineSettings, InvalidAdapterError
        from feyntune.engine.batching import BatchingEngine

        loaded = self.load()
        tokens = {p.id: prompt_tokens(loaded.tokenizer, p.prompt) for p in self.prompts}
        reference_tokens = {
            p.id: len(loaded.tokenizer.encode(" " + p.reference, add_special_tokens=False)) for p in self.prompts
        }
        context = loaded.model.config.max_position_embeddings
        longest = min(max(map(len, tokens.values())) + self.config.max_new_tokens, context)
        ranks = [json.loads((f / "adapter_config.json").read_text(encoding="utf-8"))["r"] for f in adapters.values()]
        settings = EngineSettings(
            max_adapters=max(1, len(adapters)),
            max_rank=max([1, *ranks]),
            batch_requests=self.config.max_concurrent_requests,
            batch_tokens=max(512, self.config.max_concurrent_requests),
            cache_tokens=max(
                64, 16 * math.ceil(longest / 16), min(self.config.max_concurrent_requests * (longest + 16), 65536)
            ),
            queue=max(len(missing) * SHARD, len(self.sample)),
        )
        engine = BatchingEngine(loaded.model, loaded.eos, settings)
        engine.start()
        made: dict[tuple[str, str, int], pa.Table] = {}
        try:
            for name, folder in adapters.items():
                try:
                    await engine.load_adapter(name, folder)
                except InvalidAdapterError as e:
                    raise UserError(f"Adapter {name} ({folder}) cannot complete texts: {e}.") from e
            for system, path in unscored.items():
                self.served[system] = await self._score(engine, loaded, system)
                write_shard(self.served[system], path)
            with progress("complete", sum(len(self._papers(start)) for _, _, start in missing), "texts") as bar:

                async def shard(system: str, decoding: str, start: int) -> None:
                    papers = self._papers(start)
                    ask = [self._ask(engine, loaded, system, decoding, p, tokens, reference_tokens) for p in papers]
                    rows = await asyncio.gather(*ask)
                    table = pa.Table.from_pylist(rows, MADE)
                    write_shard(table, missing[system, decoding, start])
                    made[system, decoding, start] = table
                    bar.advance(len(papers))

                await asyncio.gather(*[shard(*at) for at in missing])
        finally:
            engine.stop()
        return made

    async def _score(self, engine: Any, loaded: Loaded, system: str) -> pa.Table:
        """SERVED of the sample under one system, by the engine."""
        adapter = None if system == BASE else system
        ask = [engine.score(adapter, prompt_tokens(loaded.tokenizer, text), 0) for _, text in self.sample]
        lora = str(loaded.model.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        rows = [
            {"id": identifier, "nll": [-t.logprob for t in tokens[1:]], "lora": lora}
            for (identifier, _), tokens in zip(self.sample, await asyncio.gather(*ask), strict=True)
        ]
        return pa.Table.from_pylist(rows, SERVED)

    def _papers(self, start: int) -> list[Prompt]:
        return self.prompts[start : start + SHARD]

    async def _ask(
        self,
        engine: Any,
        loaded: Loaded,
        system: str,
        decoding: str,
        paper: Prompt,
        tokens: Mapping[str, list[int]],
        reference_tokens: Mapping[str, int],
    ) -> dict[str, Any]:
        """One row of MADE."""
        from feyntune.engine.api import Sampling

        config, ids = self.config, tokens[paper.id]
        most = max(0, min(config.max_new_tokens, engine.max_length - len(ids)))
        sampled = decoding == "sampled"
        seed = request_seed(config.seed, paper.id) if sampled else None
        sampling = Sampling(most, config.temperature, config.top_p, seed) if sampled else Sampling(most)
        adapter = None if system == BASE else system
        written = [t.id async for t in engine.submit(adapter, ids, sampling)] if most else []
        ended = bool(written) and written[-1] in loaded.eos
        written = written[:-1] if ended else written
        reason = "eos" if ended else "length"
        truncated, truncated_by = truncate(loaded.tokenizer, written, reference_tokens[paper.id])
        return {
            **paper.__dict__,
            "rule": config.rule,
            "decoding": decoding,
            "seed": config.seed if sampled else None,
            "temperature": config.temperature if sampled else None,
            "max_new_tokens": most,
            "completion": decode(loaded.tokenizer, written),
            "stop_reason": reason,
            "n_tokens": len(written),
            "truncated": truncated,
            "truncated_by": truncated_by or reason,
            "truncated_tokens": len(loaded.tokenizer.encode(truncated, add_special_tokens=False)),
            "request_seed": seed,
        }


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of new tokens alone, nothing cleaned up: it is never cut out of prompt and completion by length."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def truncate(tokenizer: Any, tokens: Sequence[int], most: int) -> tuple[str, str | None]:
    """What stands before the first blank line and within `most` tokens, and which of the two ended it (None: neither).

    A base model has not learned to stop after an abstract, so all it wrote measures stopping as much as physics.
    """
    text = decode(tokenizer, tokens[:most])
    blank = re.search(r"\n[^\S\n]*\n", text)
    if blank and text[: blank.start()].strip():
        return text[: blank.start()], "blank line"
    return text, "reference length" if len(tokens) > most else None


def measure(
    made: Mapping[str, pa.Table], data: str | Path, mixtures: Mapping[str, str | None], config: CompletionsConfig
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Tables of SCHEMA by system, and what is to be known about the measures.

    Args:
        made: tables of MADE.
        data: the sealed split; verbatim overlap is with its training papers.
        mixtures: by system the mixture it was trained on; None (the base) stands for all training papers.
    """
    columns: dict[str, dict[str, list[Any]]] = {s: {} for s in made}
    vectors, stats = _embed(made, config.similarity)
    for system, table in made.items():
        training, n = training_texts(data, mixtures[system])
        stats.setdefault("training_papers", {})[system] = n
        rows = table.to_pylist()
        texts = {"": [r["completion"] for r in rows], "truncated_": [r["truncated"] for r in rows]}
        overlaps = longest_overlaps([*texts[""], *texts["truncated_"], *(r["reference"] for r in rows)], training)
        parts = iter(overlaps.reshape(3, len(rows)).astype(float).tolist())
        for prefix, written in texts.items():
            result = columns[system]
            for name in MEASURES[:2]:
                result[prefix + name] = [None] * len(rows)
            if vectors:
                for name, before in zip(MEASURES[:2], (False, True), strict=True):
                    result[prefix + name] = [
                        _similarity(vectors, r, w, before) for r, w in zip(rows, written, strict=True)
                    ]
            repeated = [repetition(w) for w in written]
            result |= {prefix + name: [r[name] for r in repeated] for name in DEFINITIONS}
            result[prefix + "overlap"] = next(parts)
        columns[system]["reference_overlap"] = next(parts)
    tables = {
        s: pa.Table.from_pydict({**{c: t[c] for c in t.column_names}, **columns[s]}, schema=SCHEMA)
        for s, t in made.items()
    }
    return tables, stats


def training_texts(data: str | Path, mixture: str | None) -> tuple[pa.ChunkedArray, int]:
    """Abstracts a system was trained on, and their number: of the mixture, or of the whole training split."""
    papers = pq.read_table(Path(data) / "papers.parquet", columns=["id", "abstract", "split"])
    if mixture is None:
        papers = papers.filter(pc.equal(papers["split"], "train"))
    else:
        drawn = pq.read_table(Path(data) / "mixtures.parquet", columns=["mixture", "split", "id"])
        drawn = drawn.filter(pc.and_(pc.equal(drawn["mixture"], mixture), pc.equal(drawn["split"], "train")))
        if not drawn.num_rows:
            raise UserError(f"{data} has no training papers of mixture {mixture}: give the split it was trained on.")
        papers = papers.filter(pc.is_in(papers["id"], drawn["id"].combine_chunks()))
    return papers["abstract"], papers.num_rows


def _pairs(row: Mapping[str, Any], written: str, with_prompt: bool) -> tuple[str, str]:
    """The two texts that are compared: completion and reference, or (FeynTune's) both with the prompt before them."""
    if with_prompt:
        return f"{row['prompt']}{written}".strip(), f"{row['prompt']} {row['reference']}"
    return written.strip(), row["reference"]


def _similarity(vectors: Mapping[str, Any], row: Mapping[str, Any], written: str, with_prompt: bool) -> float:
    """Cosine; 0 for a completion without any text, which says nothing of the reference continuation."""
    one, other = _pairs(row, written, with_prompt)
    return float(vectors[one] @ vectors[other]) if one else 0.0


def _embed(made: Mapping[str, pa.Table], model: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unit vectors of all texts, and which model made them or why none did."""
    if model is None:
        return {}, {"similarity": {"missing": "the settings leave it out"}}
    from feyntune.evaluation.similarity import Embedder

    try:
        embedder = Embedder(model)
    except UserError as e:
        log.warning("no semantic similarity: %s", e)
        return {}, {"similarity": {"model": model, "missing": str(e)}}
    texts = {
        text
        for table in made.values()
        for row in table.to_pylist()
        for written in (row["completion"], row["truncated"])
        for with_prompt in (False, True)
        for text in _pairs(row, written, with_prompt)
        if text
    }
    log.info("embedding %d texts with %s", len(texts), model)
    stats = {"model": model, "digest": embedder.digest, "max_tokens": embedder.max_tokens}
    return embedder.embed(sorted(texts)), {"similarity": stats}
