"""Many LoRA adapters over one base in the same batch, as two matrix products a layer.

The A matrices of all adapters lie under one another in one matrix, so do the B matrices. A layer multiplies by
all of A, clears the columns of every adapter but the token's own, and multiplies by all of B. What is left is
`W x + (alpha / r) B A x` (LoRA, arXiv 2106.09685 §4.1) with each token's own A and B; a token of the base has
every column cleared.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from feyntune.engine.api import InvalidAdapterError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_DTYPES = ("F32", "F16", "BF16")
_CONFIG_BYTES = 1 << 20
# What adapter_config.json may say: anything, where the weights mean the same whatever it says ...
_FREE = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "peft_version", "auto_mapping", "megatron_core"),
    *("qalora_group_size", "layers_pattern", "ensure_weight_tying"),
}
# ... one of these values, where others would make it another kind of adapter; unknown keys must be empty.
_NEUTRAL: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (True, False, None),
    # How training began; "pissa", "olora", "corda" and their like change the base's own weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}

Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> A [r, in], scaled B [r, out]


class Slots:
    """Which adapter each token of the coming step uses; shared by all layers.

    Slot 0 is the base. `inactive_mask` [tokens, columns] is True where a column is not the token's; None when every
    token is the base's.
    """

    def __init__(self, slots: int, rank: int, device: torch.device):
        self.rank = rank
        self.inactive_mask: torch.Tensor | None = None
        own = torch.eye(slots, dtype=torch.bool, device=device).repeat_interleave(rank, dim=1)
        self._inactive = ~torch.cat([torch.zeros_like(own[:1]), own])  # [slots + 1, columns]
        self._highest = 0

    def use(self, highest: int) -> None:
        """Slots above `highest` hold nothing: their columns are not computed."""
        self._highest = highest

    def select(self, slots: Sequence[int]) -> None:
        """`slots`: one for each token of the step, in order."""
        if not any(slots):
            self.inactive_mask = None
            return
        index = torch.tensor(slots, device=self._inactive.device)
        self.inactive_mask = self._inactive[:, : self._highest * self.rank].index_select(0, index)


class MultiLora(nn.Module):
    """A linear layer of the base with the adapters of every slot beside it."""

    a: torch.Tensor  # [columns, in]
    b: torch.Tensor  # [columns, out]

    def __init__(self, base: nn.Linear, slots: Slots, count: int, dtype: torch.dtype):
        super().__init__()
        self.base, self.slots = base, slots
        self.filled: set[int] = set()
        device = base.weight.device
        shape = (count * slots.rank, base.in_features)
        self.register_buffer("a", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        shape = (count * slots.rank, base.out_features)
        self.register_buffer("b", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        inactive = self.slots.inactive_mask
        if inactive is None or not self.filled:
            return y
        columns = inactive.shape[1]
        h = F.linear(x.to(self.a.dtype), self.a[:columns])[0]  # [1, tokens, columns] -> [tokens, columns]
        # Not a product with 0 and 1: a neighbor's overflow (inf x 0 = nan) must not reach this token.
        h.masked_fill_(inactive, 0)
        return torch.addmm(y[0].to(h.dtype), h, self.b[:columns]).to(y.dtype)[None]

    def write(self, slot: int, weights: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Fill `slot` (1 and up), or empty it."""
        rows = slice((slot - 1) * self.slots.rank, slot * self.slots.rank)
        self.a[rows] = 0
        self.b[rows] = 0
        self.filled.discard(slot)
        if weights is not None:
            a, b = weights
            self.a[rows][: len(a)] = a.to(self.a)
            self.b[rows][: len(b)] = b.to(self.b)
            self.filled.add(slot)


def install(model: nn.Module, count: int, rank: int, dtype: torch.dtype) -> tuple[Slots, dict[str, MultiLora]]:
    """Put a MultiLora in place of every projection of the decoder, with `count` empty slots of `rank`."""
    device = next(model.parameters()).device
    slots = Slots(count, rank, device)
    layers = {}
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in TARGETS and isinstance(module, nn.Linear):
            layers[name] = MultiLora(module, slots, count, dtype)
            setattr(model.get_submodule(parent), last, layers[name])
    return slots, layers


def projections(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The features in and out of every linear layer that an adapter may change; before `install`."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear)
    }


def largest_adapter(layers: Mapping[str, tuple[int, int]], max_rank: int) -> int:
    """Bytes of the files of an adapter of `max_rank` on every layer in fp32, with room for what lies beside it."""
    return 4 * max_rank * sum(sum(features) for features in layers.values()) + (64 << 20)


def read_adapter(folder: Path, layers: Mapping[str, tuple[int, int]], max_rank: int) -> Weights:
    """The weights of a PEFT LoRA folder, checked against the base's `projections`; no file but safetensors is read.

    Raises:
        InvalidAdapterError: not plain LoRA, unknown layers, wrong shapes, a rank over `max_rank`, or weights that
            are not finite.
    """
    rank, scaling = _read_config(folder / "adapter_config.json")
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as f:
            shapes = {}
            for name in f.keys():  # noqa: SIM118
                entry = f.get_slice(name)
                shapes[name] = entry.get_shape()
                if entry.get_dtype() not in _DTYPES:
                    raise InvalidAdapterError(f"{name} is {entry.get_dtype()}: weights are F32, F16 or BF16")
            pairs = _check_shapes(shapes, layers, rank, max_rank)
            return {module: _pair(a, f.get_tensor(a), f.get_tensor(b), scaling) for module, (a, b) in pairs.items()}
    except (OSError, SafetensorError) as e:
        raise InvalidAdapterError(f"adapter_model.safetensors cannot be read ({e})") from e


def _read_config(file: Path) -> tuple[int, float]:
    """r, and alpha / r, of a plain LoRA's adapter_config.json; every other setting must be at its neutral value."""
    try:
        if file.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, at most {_CONFIG_BYTES} are read")
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
        for key, value in config.items():
            neutral = _NEUTRAL.get(key, (None, False, [], {}))
            if key not in _FREE and not any(value is n or (value == n and type(value) is type(n)) for n in neutral):
                raise ValueError(f"{key} is {str(value)[:60]!r}: only plain LoRA is served")
        if config.get("peft_type") != "LORA":
            raise ValueError("peft_type is missing: only plain LoRA is served")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 4096:
            raise ValueError(f"r is {str(rank)[:60]}")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= 1e6:
            raise ValueError(f"lora_alpha is {str(alpha)[:60]}")
        return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidAdapterError(f"adapter_config.json cannot be used: {e}") from e


def _check_shapes(
    shapes: Mapping[str, Sequence[int]], layers: Mapping[str, tuple[int, int]], rank: int, max_rank: int
) -> dict[str, tuple[str, str]]:
    """The names of A and B of each module, checked by the file's header alone."""
    if not shapes:
        raise InvalidAdapterError("adapter_model.safetensors holds no weights")
    pairs = {}
    for name, a in sorted(shapes.items()):
        module, part = _module(name)
        if module not in layers or part not in ("lora_A", "lora_B"):
            raise InvalidAdapterError(
                f"{name[:200]} belongs to no projection of the base: only plain LoRA on {', '.join(TARGETS)}"
            )
        if part == "lora_B":
            if name.replace(".lora_B.", ".lora_A.") not in shapes:
                raise InvalidAdapterError(f"{name.replace('.lora_B.', '.lora_A.')} is missing")
            continue
        b_name = name.replace(".lora_A.", ".lora_B.")
        if b_name not in shapes:
            raise InvalidAdapterError(f"{b_name} is missing")
        b, (features_in, features_out) = shapes[b_name], layers[module]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise InvalidAdapterError(f"{name} has shape {list(a)}, its B {list(b)}: they are not a LoRA pair")
        if a[1] != features_in or b[0] != features_out:
            raise InvalidAdapterError(
                f"{name} maps {a[1]} to {b[0]} features, the base's layer {features_in} to "
                f"{features_out}: it was trained on another base"
            )
        if a[0] > max_rank:
            raise InvalidAdapterError(
                f"{name} has rank {a[0]}, over the limit of {max_rank}: raise max_rank to serve it"
            )
        if a[0] != rank:
            raise InvalidAdapterError(f"{name} has rank {a[0]}, adapter_config.json says r is {rank}")
        pairs[module] = name, b_name
    return pairs


def _module(tensor: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` -> module of the base, `lora_A`."""
    path = tensor.removeprefix("base_model.model.").removesuffix(".weight")
    module, _, part = path.rpartition(".")
    return module, part


def _pair(name: str, a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    b = b.float().T * scaling
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InvalidAdapterError(f"{name} or its B holds values that are not finite")
    return a, b.contiguous()
