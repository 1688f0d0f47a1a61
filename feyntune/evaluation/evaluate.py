"""Score the base model and its adapters on the test abstracts, one row an abstract, and have them complete some.

Abstracts are tokenized and sorted once, the base is loaded once, and each shard of scores and of completions is
written as soon as it is complete: an interrupted evaluation resumes from it. A finished one returns without
importing torch.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, read_manifest, sha256_json, write_artifact
from feyntune.artifacts.cache import EVALUATION_VERSION
from feyntune.conditions import CONDITIONS, Conditions
from feyntune.errors import UserError
from feyntune.evaluation import as_served, completions, extraction
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.prompts import sample_papers
from feyntune.evaluation.retention import retention_papers
from feyntune.evaluation.shards import read_shard, write_shard
from feyntune.model.base import pin_base, split_pin
from feyntune.names import BASE, slug
from feyntune.telemetry import log, progress

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("primary", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # test, holdout (newer than the base's knowledge), retention
        pa.field("n_tokens", pa.int32(), nullable=False),  # predicted tokens of the text: neither BOS nor EOS
        pa.field("nll_text", pa.float64(), nullable=False),  # nats, summed over those tokens
        pa.field("nll_eos", pa.float64(), nullable=False),  # nats, of the EOS after them
        pa.field("entropy_sum", pa.float64(), nullable=False),  # nats, of the predictive distribution, summed
        pa.field("n_bytes", pa.int32(), nullable=False),  # of the text in UTF-8
        pa.field("n_chars", pa.int32(), nullable=False),
    ]
)

SHARD = 1024  # abstracts between two writes
SPECIAL_TOKENS = "BOS before, EOS after and counted apart"
LORA = "fp32"  # what peft computes an adapter in, whatever the base's precision


def evaluate(
    data: str | Path,
    base: str,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    config: EvaluateConfig | None = None,
) -> Manifest:
    """Score every system into a sealed `evaluation` at `out`: `scores/SLUG.parquet`, columns as SCHEMA, by id.

    `conditions.json` says how (feyntune.conditions): what figures must agree in to be compared.
    With `config.completions` also `completions/SLUG.parquet`, columns as completions.SCHEMA, by id and decoding; with
    `config.extraction`, `extraction/SLUG.parquet` of every adapter, columns as extraction.SCHEMA. The manifest's
    inputs name the split, the base, each adapter, the test set (`test`, see test_digest) and the retention texts. Its
    stats say how much the endpoint's arithmetic differs from that of the scores (`as_served`).

    Args:
        data: a sealed `split`.
        base: a model folder, `s3://` folder or hub id, with or without `@digest`.
        adapters: sealed `adapter` folders by variant name.

    Raises:
        UserError: nothing to score, no test paper in the categories, an adapter that was trained on another base,
            or `out` holds another evaluation.
        ArtifactError: a folder is damaged or of another kind.
    """
    config = config or EvaluateConfig()
    out = Path(out)
    systems = ([BASE] if config.include_base else []) + sorted(adapters)
    if not systems:
        raise UserError("There is nothing to evaluate: give an adapter, or leave the base in.")
    pinned = pin_base(base)
    inputs = {"split": open_artifact(data, "split").digest, "base": split_pin(pinned)[1] or ""}
    for name in sorted(adapters):
        inputs[name] = _checked_adapter(name, adapters[name], inputs["base"])
    papers = test_papers(data, config.categories)
    inputs["test"] = test_digest(papers)
    distant = retention_papers(config.retention, config.retention_texts)
    if config.retention:
        inputs["retention"] = test_digest(distant)
    papers = pa.concat_tables([papers, distant.select(papers.column_names).cast(papers.schema)]).sort_by("id")

    if (out / MANIFEST).is_file():
        done = open_artifact(out, "evaluation")
        if (done.inputs, done.config) == (inputs, config.model_dump(mode="json")):
            log.info("%s is already evaluated", ", ".join(systems))
            return done
        raise UserError(f"{out} holds an evaluation of something else: choose another folder.")

    with write_artifact(out, "evaluation", inputs, config.model_dump(mode="json")) as folder:
        (folder.path / "scores").mkdir()
        conditions = _conditions(inputs["test"], config)
        (folder.path / CONDITIONS).write_text(conditions.model_dump_json(indent=1) + "\n", encoding="utf-8")
        scorer = _Scorer(pinned, papers, config, out.parent, conditions)
        for system in systems:  # the base first, while there is no adapter in it
            table = scorer.score(system, adapters.get(system), inputs.get(system))
            pq.write_table(table, folder.path / "scores" / f"{slug(system)}.parquet")
            if config.extraction is not None and system in adapters:
                missing = _extract(scorer, folder.path, data, system, adapters[system], inputs)
                folder.stats.setdefault("extraction", {})[system] = missing
            if config.completions is not None:
                scorer.sample(system, adapters.get(system), inputs.get(system))
        folder.stats |= scorer.stats()
        if config.completions is not None:
            (folder.path / "completions").mkdir()
            tables, stats = _complete(scorer, data, systems, adapters, inputs, config)
            for system, table in tables.items():
                pq.write_table(table, folder.path / "completions" / f"{slug(system)}.parquet")
            folder.stats["completions"] = stats
            folder.stats["as_served"] = scorer.as_served
    scorer.forget()
    return open_artifact(out, "evaluation")


def _extract(
    scorer: "_Scorer", folder: Path, data: str | Path, system: str, adapter: str | Path, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Write one adapter's `extraction/SLUG.parquet`; {} or {missing: why there is none}."""
    settings, mixture = scorer.config.extraction, _mixture(system, adapter)
    assert settings is not None
    if read_manifest(adapter).inputs.get("split") != inputs["split"]:
        return {"missing": "it was trained on another split: which papers it has read is not known here"}
    pairs = extraction.pairs(data, mixture or "", settings.papers)
    if pairs.num_rows < 4:
        return {"missing": f"fewer than two pairs of papers of {mixture or 'its mixture'} of the same age"}
    table = scorer.extract(system, adapter, inputs[system], pairs)
    (folder / "extraction").mkdir(exist_ok=True)
    pq.write_table(table, folder / "extraction" / f"{slug(system)}.parquet")
    return {}


def _complete(
    scorer: "_Scorer",
    data: str | Path,
    systems: list[str],
    adapters: Mapping[str, str | Path],
    inputs: Mapping[str, str],
    config: EvaluateConfig,
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Tables of completions.SCHEMA by system, and stats about their making."""
    assert config.completions is not None
    asked = completions.prompts(scorer.papers, config.categories, config.completions)
    key = {"base": inputs["base"], "precision": config.precision}
    sample = [(p["id"], p["abstract"]) for p in scorer.served_sample().to_pylist()]
    completer = completions.Completer(asked, config.completions, scorer.folder, key, scorer.generator, sample)
    started = time.monotonic()
    digests = {name: inputs[name] for name in adapters}
    made = completer.complete(systems, adapters, digests)
    seconds = time.monotonic() - started
    scorer.shards += completer.shards
    for system, served in completer.served.items():
        scored_by = {"lora": LORA, "attention": scorer.conditions.attention}
        served_by = {"lora": served["lora"][0].as_py(), "attention": "sdpa"}
        scored, by_engine = scorer.sampled[system]["nll"].to_pylist(), served["nll"].to_pylist()
        scorer.as_served[system] = as_served.difference(scored, by_engine, scored_by, served_by)
    mixtures = {s: _mixture(s, adapters[s]) if s in adapters else None for s in systems}
    tables, stats = completions.measure(made, data, mixtures, config.completions)
    papers = len(pc.unique(next(iter(tables.values()))["id"]))
    stats |= {"papers": papers, "prompts_longer_than_context": len(asked) - papers}
    return tables, {**stats, "seconds": seconds, "shards_resumed": completer.resumed}


def _mixture(name: str, adapter: str | Path) -> str | None:
    """What an adapter was trained on, by its manifest or else its name; None: not known."""
    return read_manifest(adapter).config.get("mixture") or name.rpartition("/")[0] or None


def test_papers(data: str | Path, categories: list[str]) -> pa.Table:
    """Test and hold-out papers of `categories` in the split `data`, sorted by id, without withdrawn ones.

    Raises:
        UserError: a category has none.
    """
    papers = pq.read_table(Path(data) / "papers.parquet", columns=["id", "primary", "abstract", "withdrawn", "split"])
    selected = pc.and_(pc.is_in(papers["split"], pa.array(["test", "holdout"])), pc.invert(papers["withdrawn"]))
    papers = papers.filter(selected).drop_columns("withdrawn").sort_by("id")
    result = [category_of(p, categories) for p in papers["primary"].to_pylist()]
    for category in categories:
        if category not in result:
            raise UserError(f"{data} has no test paper of category {category}: take it out, or use a larger corpus.")
    return papers.filter(pa.array([f is not None for f in result], pa.bool_()))


def category_of(primary: str, categories: list[str]) -> str | None:
    """Which of `categories` a primary category falls under: `cs.LG` under `cs.LG` or else `cs`."""
    archive = primary.partition(".")[0]
    return next((c for c in (primary, archive) if c in categories), None)


def test_digest(papers: pa.Table) -> str:
    """Digest of a test set: ids, split and text of its papers. Only scores on one test set may be compared."""
    return sha256_json([papers[c].to_pylist() for c in ("id", "split", "abstract")])


def _conditions(test: str, config: EvaluateConfig) -> Conditions:
    """How this process measures: known before the base is loaded."""
    import torch

    from feyntune.model.load import get_device
    from feyntune.model.packed import attention_backend

    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    return Conditions(
        test=test,
        precision=config.precision,
        lora=LORA,
        attention=attention_backend(get_device(), dtype),
        max_length=None,
        special_tokens=SPECIAL_TOKENS,
        evaluation=EVALUATION_VERSION,
    )


def _checked_adapter(name: str, folder: str | Path, base: str) -> str:
    if name == BASE or slug(name) == BASE:
        raise UserError(f"An adapter cannot be called {BASE!r}, the base model's name: call it by its variant.")
    adapter = open_artifact(folder, "adapter")
    trained_on = adapter.inputs.get("base", "")
    if trained_on != base:
        raise UserError(
            f"Adapter {name} ({folder}) was trained on base {trained_on[:16] or 'unknown'}, not on "
            f"{base[:16]}: give the base model it was trained on."
        )
    return adapter.digest


class _Scorer:
    """Everything loaded once: token ids on first need, the base model on first need, adapters one at a time.

    Finished shards lie beside the output, in a folder named by what decides them.
    """

    def __init__(self, base: str, papers: pa.Table, config: EvaluateConfig, folder: Path, conditions: Conditions):
        self.base, self.papers, self.config, self.folder = base, papers, config, folder
        self.conditions = conditions
        self.shards: list[Path] = []
        self.model: Any = None
        self.loaded: str | Path | None = None  # the adapter in use
        self.base_tokens: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.sampled: dict[str, pa.Table] = {}
        self.as_served: dict[str, Any] = {}
        self.tokens, self.seconds, self.resumed = 0, 0.0, 0

    def score(self, system: str, adapter: str | Path | None, digest: str | None) -> pa.Table:
        """Scores of one system as SCHEMA, sorted by id."""
        shards = self._shards(digest, self.papers)
        order = self._order()
        pieces = []
        with progress(f"score {system}", len(order), "abstracts") as bar:
            for start in range(0, len(order), SHARD):
                rows = order[start : start + SHARD]
                path = shards / f"{start:08d}.parquet"
                table = read_shard(path, SCHEMA, len(rows))
                if table is None:
                    self._load(adapter)
                    table = self._score_rows(rows)
                    write_shard(table, path)
                else:
                    self.resumed += 1
                pieces.append(table)
                bar.advance(len(rows))
        return pa.concat_tables(pieces).sort_by("id")

    def _shards(self, digest: str | None, papers: pa.Table) -> Path:
        """The folder of what is known already of these papers under an adapter."""
        key = {"base": split_pin(self.base)[1], "adapter": digest, **self.conditions.model_dump()}
        key |= {"texts": test_digest(papers)}
        key |= self.config.model_dump(mode="json", exclude={"include_base", "categories", "completions", "extraction"})
        shards = self.folder / f".scores-{sha256_json(key)[:16]}"
        shards.mkdir(parents=True, exist_ok=True)
        self.shards.append(shards)
        return shards

    def extract(self, system: str, adapter: str | Path, digest: str | None, pairs: pa.Table) -> pa.Table:
        """Columns of extraction.SCHEMA: `pairs` read by the base with the adapter, and without it."""
        assert self.config.extraction is not None
        texts, most = pairs["abstract"].to_pylist(), self.config.extraction.tokens
        path = self._shards(digest, pairs) / f"extraction-{most}.parquet"
        table = read_shard(path, extraction.SCHEMA, pairs.num_rows)
        if table is not None:
            self.resumed += 1
            return table
        self._load(adapter)
        own = self._score_tokens(texts, most)
        known = sha256_json(texts)
        if known not in self.base_tokens:  # adapters of one mixture have the same pairs
            with self.model.disable_adapter():
                self.base_tokens = {known: self._score_tokens(texts, most)}
        columns = {c: pairs[c] for c in ("pair", "split", "id", "date")}
        for before, scored in (("", own), ("base_", self.base_tokens[known])):
            columns |= {f"{before}nll": [n for n, _ in scored], f"{before}greedy": [g for _, g in scored]}
        table = pa.Table.from_pydict(columns, schema=extraction.SCHEMA)
        write_shard(table, path)
        return table

    def served_sample(self) -> pa.Table:
        """The test papers on which the endpoint's arithmetic is compared with the scores'."""
        return sample_papers(self.papers.filter(pc.equal(self.papers["split"], "test")), as_served.TEXTS)

    def sample(self, system: str, adapter: str | Path | None, digest: str | None) -> None:
        """Log probabilities of the tokens of `served_sample`, by the arithmetic of the scores."""
        papers = self.served_sample()
        path = self._shards(digest, papers) / "sample.parquet"
        table = read_shard(path, completions.SERVED, papers.num_rows)
        if table is None:
            self._load(adapter)
            scored = [n for n, _ in self._score_tokens(papers["abstract"].to_pylist(), None)]
            columns = {"id": papers["id"], "nll": scored, "lora": [LORA] * len(scored)}
            table = pa.Table.from_pydict(columns, schema=completions.SERVED)
            write_shard(table, path)
        self.sampled[system] = table

    def _score_tokens(self, texts: list[str], most: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Loss and "is a most likely token" of the first `most` tokens of each text."""
        from feyntune.evaluation.scoring import score_tokens
        from feyntune.model.load import prompt

        documents = [prompt(self.tokenizer, t)[: None if most is None else most + 1] for t in texts]
        return score_tokens(self.model, documents, self.config.tokens_per_batch, self.config.tokens_per_head)

    def _order(self) -> np.ndarray:
        """Rows from the longest abstract to the shortest: batches are even, and too little memory shows at once."""
        lengths = pc.binary_length(self.papers["abstract"].cast(pa.binary())).to_numpy()
        return np.argsort(-lengths, kind="stable")

    def _load(self, adapter: str | Path | None) -> None:
        import torch

        from feyntune.model.load import check_vocab_size, get_device, load_base, load_tokenizer, with_adapter

        device = get_device()
        if self.model is None:
            self.tokenizer = load_tokenizer(self.base)
            self.model = load_base(self.base, self.config.precision, device)
            check_vocab_size(self.model, self.tokenizer, self.base)
            self.hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        if adapter is not None and adapter != self.loaded:
            self.model, self.loaded = with_adapter(self.model, adapter), adapter

    def generator(self) -> completions.Loaded:
        """The base model without adapters, ready to generate; nothing is scored after this."""
        import torch

        from feyntune.model.load import check_vocab_size, get_device, load_base, load_tokenizer

        if self.model is None:
            self.tokenizer = load_tokenizer(self.base)
            model = load_base(self.base, self.config.precision, get_device(), attention="sdpa")
            check_vocab_size(model, self.tokenizer, self.base)
        else:
            model = self.model.unload() if hasattr(self.model, "unload") else self.model
            model.set_attn_implementation("sdpa")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.model = None
        given = model.generation_config.eos_token_id
        eos = {self.tokenizer.eos_token_id, *([given] if isinstance(given, int) else given or [])}
        return completions.Loaded(model, self.tokenizer, sorted(eos))

    def _score_rows(self, rows: np.ndarray) -> pa.Table:
        from feyntune.evaluation.scoring import score
        from feyntune.model.load import encode

        papers = self.papers.take(pa.array(rows))
        texts = papers["abstract"].to_pylist()
        documents = [encode(self.tokenizer, t) for t in texts]
        for paper, document in zip(papers["id"].to_pylist(), documents, strict=True):
            if len(document) < 3:
                raise UserError(f"Paper {paper} has an empty abstract: ingest and split the corpus again.")
        started = time.monotonic()
        scores = score(self.model, documents, self.config.tokens_per_batch, self.config.tokens_per_head)
        self.seconds += time.monotonic() - started
        self.tokens += int(scores.n_tokens.sum())
        columns = {c: papers[c] for c in ("id", "primary", "split")} | scores._asdict()
        columns |= {"n_bytes": [len(t.encode()) for t in texts], "n_chars": [len(t) for t in texts]}
        return pa.Table.from_pydict(columns, schema=SCHEMA)

    def stats(self) -> dict[str, Any]:
        """How this making went; nothing of it is in the digest."""
        stats: dict[str, Any] = {"seconds": self.seconds, "tokens": self.tokens, "shards_resumed": self.resumed}
        if self.model is not None:
            stats |= {"tokens_per_second": self.tokens / self.seconds, "hardware": self.hardware}
        return stats

    def forget(self) -> None:
        """Remove the shards, once their rows are sealed."""
        for shards in self.shards:
            shutil.rmtree(shards, ignore_errors=True)
