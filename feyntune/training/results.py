"""What a finished training writes beside its curve: the adapter's files, and facts about the machine."""

import json
import platform
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from feyntune.errors import UserError
from feyntune.model.base import split_pin
from feyntune.telemetry import peak_memory_bytes


def write_adapter(model: PeftModel, base: str, folder: Path) -> None:
    """The adapter as peft loads it, in fp16: it has three more bits of mantissa than bf16."""
    weights = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in sorted(get_peft_model_state_dict(model).items())
    }
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError("The adapter's weights are too large for 16 bits: training diverged, lower learning_rate.")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    location = split_pin(base)[0]
    settings = model.peft_config["default"].to_dict()  # type: ignore[union-attr,index]
    settings |= {
        "base_model_name_or_path": Path(location).name if Path(location).is_dir() else location,
        "revision": None,
        "inference_mode": True,
    }
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    (folder / "adapter_config.json").write_text(
        json.dumps(plain, indent=1, sort_keys=True, default=str), encoding="utf-8"
    )


def hardware(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on the GPU, or a CPU process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()
