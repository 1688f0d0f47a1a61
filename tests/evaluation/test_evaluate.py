import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import ArtifactError, read_manifest
from feyntune.errors import UserError
from feyntune.evaluation import evaluate as room
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate

FP32 = EvaluateConfig(precision="fp32", completions=None, retention=None)


def reference(base, adapter, text):
    """Text loss, EOS loss and entropy in nats by the definition: one document, all logits, no packing."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *words, tokenizer.eos_token_id]])
    with torch.no_grad():
        logp = model.eval()(ids).logits[0].double().log_softmax(-1)
    losses = [-logp[t, ids[0, t + 1]].item() for t in range(len(words) + 1)]
    entropies = -(logp.exp() * logp).sum(-1)[: len(words)]
    return len(words), sum(losses[:-1]), losses[-1], entropies.sum().item()


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_base, tiny_split, adapters):
    out = tmp_path_factory.mktemp("scored") / "evaluation"
    evaluate(tiny_split, tiny_base, adapters, out, FP32)
    return out


def test_every_system_gets_one_row_for_each_test_abstract_of_the_category(scored, tiny_split):
    papers = pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()
    expected = [p for p in papers if p["split"] == "test" and p["primary"] == "hep-th"]
    for name in ("base", "hep-th.lora-qkv", "hep-ph_gr-qc.lora-all"):
        table = pq.read_table(scored / "scores" / f"{name}.parquet")
        assert table.schema.equals(room.SCHEMA)
        assert table["id"].to_pylist() == [p["id"] for p in expected]
        assert table["n_bytes"].to_pylist() == [len(p["abstract"].encode()) for p in expected]
    assert len(list((scored / "scores").iterdir())) == 3


@pytest.mark.parametrize("system", ["base", "hep-th/lora-qkv", "hep-ph+gr-qc/lora-all"])
def test_scores_agree_with_logits_of_one_document_at_a_time(scored, tiny_base, tiny_split, adapters, system):
    papers = {p["id"]: p for p in pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()}
    rows = pq.read_table(scored / "scores" / f"{room.slug(system)}.parquet").to_pylist()
    for row in rows[::4]:
        n, text, eos, entropy = reference(tiny_base, adapters.get(system), papers[row["id"]]["abstract"])
        assert row["n_tokens"] == n
        result = [row["nll_text"], row["nll_eos"], row["entropy_sum"]]
        np.testing.assert_allclose(result, [text, eos, entropy], rtol=1e-4)


def test_scores_do_not_depend_on_batches_shards_or_company(
    tmp_path, tiny_base, tiny_split, adapters, scored, monkeypatch
):
    monkeypatch.setattr(room, "SHARD", 5)
    small = FP32.model_copy(update={"include_base": False, "tokens_per_batch": 64, "tokens_per_head": 7})
    name = "hep-ph+gr-qc/lora-all"
    evaluate(tiny_split, tiny_base, {name: adapters[name]}, tmp_path / "alone", small)
    assert [p.name for p in (tmp_path / "alone" / "scores").iterdir()] == ["hep-ph_gr-qc.lora-all.parquet"]
    for column in ("id", "nll_text", "entropy_sum"):
        one = pq.read_table(tmp_path / "alone/scores/hep-ph_gr-qc.lora-all.parquet")[column].to_pylist()
        two = pq.read_table(scored / "scores/hep-ph_gr-qc.lora-all.parquet")[column].to_pylist()
        assert one == two if column == "id" else np.allclose(one, two, rtol=1e-5)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_digest(
    tmp_path, tiny_base, tiny_split, adapters, monkeypatch
):
    monkeypatch.setattr(room, "SHARD", 5)
    straight = evaluate(tiny_split, tiny_base, adapters, tmp_path / "straight", FP32)
    assert straight.stats["shards_resumed"] == 0

    whole, calls = room._Scorer._score_rows, []

    def dies(self, rows):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, rows)

    monkeypatch.setattr(room._Scorer, "_score_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_split, tiny_base, adapters, tmp_path / "killed/evaluation", FP32)
    assert not (tmp_path / "killed/evaluation").exists()
    resumed = evaluate(tiny_split, tiny_base, adapters, tmp_path / "killed/evaluation", FP32)
    assert resumed.stats["shards_resumed"] == 4
    assert resumed.digest == straight.digest
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["evaluation"]


def test_a_damaged_shard_is_scored_again(tmp_path, tiny_base, tiny_split, scored, monkeypatch):
    whole = room.write_shard

    def cut(table, path):
        whole(table, path)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_split, tiny_base, {}, tmp_path / "out", FP32)
    monkeypatch.setattr(room, "write_shard", whole)
    assert evaluate(tiny_split, tiny_base, {}, tmp_path / "out", FP32).stats["shards_resumed"] == 0
    assert pq.read_table(tmp_path / "out/scores/base.parquet") == pq.read_table(scored / "scores/base.parquet")


def test_a_finished_evaluation_returns_without_torch(scored, tiny_base, tiny_split, adapters):
    script = (
        "import sys; from feyntune.evaluation.evaluate import evaluate; "
        "from feyntune.evaluation.config import EvaluateConfig; "
        f"m = evaluate({tiny_split!r}, {tiny_base!r}, { {k: str(v) for k, v in adapters.items()}!r}, {str(scored)!r}, "
        "EvaluateConfig(precision='fp32', completions=None, retention=None)); "
        "assert 'torch' not in sys.modules; print(m.digest)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == read_manifest(scored).digest


def test_another_configuration_does_not_overwrite(scored, tiny_base, tiny_split):
    with pytest.raises(UserError, match="holds an evaluation of something else"):
        evaluate(tiny_split, tiny_base, {}, scored, FP32)


def test_holdout_papers_are_scored_beside_the_test_set(tmp_path, tiny_base, tiny_split):
    split = tmp_path / "split"
    shutil.copytree(tiny_split, split)
    change_split(split, lambda row: "holdout" if row["split"] == "validation" else row["split"])
    evaluate(split, tiny_base, {}, tmp_path / "out", FP32)
    splits = pq.read_table(tmp_path / "out/scores/base.parquet")["split"].to_pylist()
    assert (splits.count("test"), splits.count("holdout")) == (12, 12)


def test_an_archive_stands_for_its_categories():
    assert room.category_of("cs.LG", ["hep-th", "cs"]) == "cs"
    assert room.category_of("physics.hist-ph", ["cs", "hep-ph"]) is None
    assert room.category_of("hep-th", ["hep-th"]) == "hep-th"


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_base, tiny_split, adapters):
    other = reseal(adapters["hep-th/lora-qkv"], tmp_path / "other", inputs={"base": "f" * 64})
    with pytest.raises(UserError, match="trained on base ffff"):
        evaluate(tiny_split, tiny_base, {"hep-th/lora-qkv": other}, tmp_path / "out", FP32)


def test_a_damaged_adapter_is_refused_by_name(tmp_path, tiny_base, tiny_split, adapters):
    folder = tmp_path / "damaged"
    shutil.copytree(adapters["hep-th/lora-qkv"], folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors"):
        evaluate(tiny_split, tiny_base, {"hep-th/lora-qkv": folder}, tmp_path / "out", FP32)


def test_a_category_without_test_papers_is_refused(tmp_path, tiny_base, tiny_split):
    with pytest.raises(UserError, match="no test paper of category q-bio"):
        evaluate(tiny_split, tiny_base, {}, tmp_path / "out", EvaluateConfig(categories=["hep-th", "q-bio"]))


def test_nothing_to_score_is_refused(tmp_path, tiny_base, tiny_split):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(tiny_split, tiny_base, {}, tmp_path / "out", EvaluateConfig(include_base=False))


def reseal(folder, out, **changes):
    """A copy of a artifact with another manifest."""
    from feyntune.artifacts.artifact import MANIFEST, write_manifest

    manifest = read_manifest(folder)
    shutil.copytree(folder, out)
    (out / MANIFEST).unlink()
    parts = {"kind": manifest.kind, "inputs": manifest.inputs, "config": manifest.config, "stats": manifest.stats}
    write_manifest(out, **(parts | changes))
    return out


def change_split(folder, split_of):
    """Give the papers of a copied split other splits and seal it again."""
    import pyarrow as pa

    from feyntune.artifacts.artifact import MANIFEST, write_manifest

    table = pq.read_table(folder / "papers.parquet")
    rows = [row | {"split": split_of(row)} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "papers.parquet")
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest.kind, manifest.inputs, manifest.config)


def test_logits_never_exist_for_more_tokens_than_asked(tiny_base):
    from feyntune.evaluation.scoring import score
    from feyntune.model.load import encode, load_base, load_tokenizer
    from feyntune.model.packed import head

    model, tokenizer = load_base(tiny_base, "fp32", "cpu"), load_tokenizer(tiny_base)
    rows = []
    head(model).register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    documents = [encode(tokenizer, "The soup has a good smell. " * k) for k in (5, 3, 1)]
    score(model, documents, tokens_per_batch=4096, tokens_per_head=16)
    assert max(rows) == 16
    assert sum(rows) == sum(len(d) - 1 for d in documents)
