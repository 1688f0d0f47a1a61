"""What somebody with bad intentions would send and register: fixed cases, and a grammar of them for hypothesis."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from feyntune.artifacts.artifact import write_artifact
from feyntune.model.base import folder_digest
from tests.serving.factories import save_adapter

COMPLETIONS = "/openai/v1/completions"


def hostile_bodies() -> list[tuple[str, bytes]]:
    """(path, body) of requests that must be refused with a 4xx."""
    asked = {"model": "base", "prompt": "x", "max_tokens": 2}
    wrong: list[dict] = [
        {"stop": ["a" * 250_000]},
        {"stop": ["a"] * 20_000},
        {"prompt": [{}] * 20_000},
        {"prompt": [[]] * 20_000},
        {"prompt": [[1]] * 2_000},
        {"prompt": [10**30]},
        {"prompt": "x" * 60_000},
        {"max_tokens": 10**12},
        {"n": 10**9},
        {"temperature": 1e308},
        {"logit_bias": {str(i): 1 for i in range(5000)}},
        {"logprobs": 10**6, "echo": True},
        {"seed": 2**70},
        {"model": "../../etc/passwd"},
        {"model": "x" * 200_000},
        {"stream": {"a": 1}},
        {"stream_options": {str(i): i for i in range(50_000)}},
        {str(i): i for i in range(50_000)},
    ]
    bodies = [(COMPLETIONS, json.dumps(asked | w).encode()) for w in wrong]
    bodies += [(COMPLETIONS, b"[" * 50_000), (COMPLETIONS, b'{"model":"base","prompt":' + b"[" * 50_000)]
    bodies += [(COMPLETIONS, b"\xff\xfe"), (COMPLETIONS, b"x" * (2 << 20))]
    bodies += [("/v1/models/base:predict", b"[" * 50_000), ("/v2/models/base/infer", b'{"inputs":[{}]}')]
    texts = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    many = {"stop": [{}] * 50_000}, {str(i): i for i in range(50_000)}
    for parameters in (*many, [1], 5, {"stop": [{}]}, {"logit_bias": {str(i): 1 for i in range(5000)}}):
        bodies.append(("/v1/models/base:predict", json.dumps({"instances": ["x"], "parameters": parameters}).encode()))
        bodies.append(("/v2/models/base/infer", json.dumps({"inputs": [texts], "parameters": parameters}).encode()))
    tensors = (
        [{}] * 50_000,
        [texts] * 2,
        [texts | {"shape": [10**12]}],
        [texts | {"shape": [-1]}],
        ["x"],
        {"a": 1},
        None,
    )
    for inputs in tensors:
        bodies.append(("/v2/models/base/infer", json.dumps({"inputs": inputs}).encode()))
    for wrong in ({"outputs": [{"name": "x"}]}, {"outputs": [{"name": "text", "parameters": [1]}]}, {"id": [5]}):
        bodies.append(("/v2/models/base/infer", json.dumps({"inputs": [texts], **wrong}).encode()))
    bodies += [("/tokenize", json.dumps({"prompt": "x"} | {str(i): i for i in range(50_000)}).encode())]
    bodies += [("/detokenize", b'{"tokens":[99999999]}'), ("/tokenize", b'{"prompt":' + b"[" * 50_000)]
    return bodies


Tensors = dict[str, torch.Tensor]


def _sealed(folder: Path, base: str, source: Path, config: dict, weights: Tensors | bytes) -> Path:
    inputs = {"base": folder_digest(base), "split": "1" * 64}
    with write_artifact(folder, "adapter", inputs=inputs, config={"variant": "hostile/lora-all"}) as tmp:
        path = Path(tmp.path)
        settings = json.loads((source / "adapter_config.json").read_text()) | config
        (path / "adapter_config.json").write_text(json.dumps(settings))
        if isinstance(weights, bytes):
            (path / "adapter_model.safetensors").write_bytes(weights)
        else:
            save_file({k: v.contiguous() for k, v in weights.items()}, path / "adapter_model.safetensors")
    return folder


def hostile_adapters(folder: Path, base: str) -> dict[str, Path]:
    """Sealed adapters of the right base by variant, none of which can be served."""
    good = save_adapter(folder / "good", base, rank=2, seed=5)
    weights = load_file(good / "adapter_model.safetensors")
    first = next(iter(weights))
    changes: dict[str, tuple[dict, Tensors | bytes]] = {
        "float8": ({}, {k: v.to(torch.float8_e4m3fn) for k, v in weights.items()}),
        "integers": ({}, {k: v.to(torch.int8) for k, v in weights.items()}),
        "nan": ({}, weights | {first: torch.full_like(weights[first], torch.nan)}),
        "overflow": ({}, {k: v * 1e30 for k, v in weights.items()}),
        "no-rank": ({}, weights | {first: weights[first][:0]}),
        "foreign-layer": ({}, {k.replace("layers.0", "layers.77"): v for k, v in weights.items()}),
        "half-a-pair": ({}, {k: v for k, v in weights.items() if k != first}),
        "empty": ({}, {"x": torch.zeros(1)}),
        "torn": ({}, (good / "adapter_model.safetensors").read_bytes()[:500]),
        "huge-header": ({}, (1 << 60).to_bytes(8, "little") + b"{}"),
        "huge-alpha": ({"lora_alpha": 10**400}, weights),
        "dora": ({"use_dora": True}, weights),
        "nested": ({"loftq_config": [[[[{}]]]]}, weights),
    }
    made = {f"hostile-{n}/lora-all": _sealed(folder / n, base, good, *change) for n, change in changes.items()}
    shutil.rmtree(good)
    return made


_junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
_fields = [
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "min_tokens", "n", "seed", "stop"),
    *("stream", "logprobs", "echo", "logit_bias", "stop_token_ids", "messages", "tools", "best_of", "suffix"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "stream_options", "parameters", "instances"),
]
bodies = st.dictionaries(st.sampled_from(_fields), _junk, max_size=6).map(
    lambda fields: {"model": "base", "prompt": "x", "max_tokens": 2} | fields
)
# Of KServe's protocols, by path.
_tensor = st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), _junk).map(
    lambda fields: {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]} | fields
)
_settings = st.dictionaries(st.sampled_from(_fields), _junk, max_size=4)
kserve_bodies = st.one_of(
    st.tuples(st.just("/v1/models/base:predict"), st.fixed_dictionaries({"instances": _junk, "parameters": _settings})),
    st.tuples(st.just("/v1/models/base:predict"), st.just({"instances": ["x"]}).map(dict) | _settings),
    st.tuples(
        st.just("/v2/models/base/infer"),
        st.fixed_dictionaries(
            {"inputs": st.lists(_tensor, max_size=2)}, optional={"parameters": _settings, "outputs": _junk, "id": _junk}
        ),
    ),
)
configs = st.dictionaries(
    st.sampled_from(
        ["r", "lora_alpha", "peft_type", "bias", "use_dora", "use_rslora", "rank_pattern", "target_modules", "extra"]
    ),
    _junk,
    min_size=1,
    max_size=4,
)


@st.composite
def weight_changes(draw: st.DrawFn) -> Callable[[Tensors], Tensors]:
    """A change of one tensor: its type, shape, values or name."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.bool, torch.complex64]))
    shape = draw(st.none() | st.lists(st.integers(0, 9), max_size=4))
    value = draw(st.none() | st.sampled_from([float("nan"), float("inf"), 1e38, 1e-45]))
    name = draw(st.none() | st.text(min_size=1, max_size=30))
    index = draw(st.integers(0, 100))

    def change(weights: Tensors) -> Tensors:
        key = sorted(weights)[index % len(weights)]
        tensor = weights[key] if shape is None else torch.zeros(shape)
        tensor = tensor if value is None else torch.full_like(tensor, value)
        others = {k: v for k, v in weights.items() if k != key}
        return others | {name or key: tensor.to(dtype)}

    return change
