"""Adapters and registry entries for tests and benchmarks: PEFT's own LoRA with random weights, properly sealed."""

import json
import tempfile
from pathlib import Path

import torch

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.model.base import folder_digest
from feyntune.model.load import load_base
from feyntune.names import slug
from feyntune.registry.gate import Interval, Measured, Perplexity, Policy, check_gate
from feyntune.registry.models import Version
from feyntune.registry.registry import Registry

QKV = ["q_proj", "k_proj", "v_proj"]
ALL = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(folder: Path, base: str, *, targets=ALL, rank=4, seed=0, strength=0.1, **lora) -> Path:
    """A PEFT LoRA folder whose weights are random and strong enough to change what the mini base says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = load_base(base, "fp32", "cpu", attention="sdpa")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * strength)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def seal_adapter(
    folder: Path,
    base: str,
    variant: str = "hep-th/lora-all",
    *,
    base_digest: str | None = None,
    extra: str | None = None,
    **adapter,
) -> Path:
    """As the train room leaves it; `extra` is a file that does not belong there."""
    mixture, _, method = variant.partition("/")
    adapter.setdefault("targets", QKV if method == "lora-qkv" else ALL)
    inputs = {"base": base_digest or folder_digest(base), "split": "1" * 64}
    config = {"variant": variant, "mixture": mixture, "method": method}
    with write_artifact(folder, "adapter", inputs=inputs, config=config) as tmp:
        save_adapter(tmp.path, base, **adapter)
        (tmp.path / "curve.json").write_text(json.dumps([]))
        if extra:
            (tmp.path / extra).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return folder


def version_of(variant: str, folder: Path, perplexity: float = 9.0) -> Version:
    """A registered version of a sealed adapter that passed its gate."""
    manifest = read_manifest(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    measured = Measured(
        test="2" * 64,
        base=manifest.inputs["base"],
        abstracts=50,
        base_perplexity=Perplexity(abstract_mean=10.0, token=10.0),
        perplexity=Perplexity(abstract_mean=perplexity, token=perplexity),
        delta=Interval(mean=perplexity - 10, low=perplexity - 10.5, high=perplexity - 9.5),
    )
    return Version(
        variant=variant,
        digest=manifest.digest,
        adapter=f"adapters/{slug(variant)}/{manifest.digest}",
        card=f"cards/{slug(variant)}/{manifest.digest}/{'3' * 64}",
        rank=config["r"],
        targets=sorted(config["target_modules"]),
        lineage={"base": manifest.inputs["base"], "split": manifest.inputs["split"]},
        measured=measured,
        gate=check_gate(measured, Policy()),
    )


def register_adapter(
    registry: Registry, variant: str, folder: Path, perplexity: float = 9.0, examples: list[str] | None = None
) -> Version:
    with tempfile.TemporaryDirectory() as tmp:
        card = Path(tmp) / "card"
        with write_artifact(card, "card") as sealed:
            (sealed.path / "README.md").write_text("# card\n")
        version = version_of(variant, folder, perplexity).model_copy(update={"examples": examples or []})
        return registry.add([(version, folder, card)])[0]
