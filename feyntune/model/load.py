"""Base models and tokenizers: where they come from, how they are loaded, and the special tokens of a text.

Training, perplexity and generation all read texts through `encode` and `prompt`, so that the same special
tokens stand at the same places in all three.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from feyntune.errors import UserError
from feyntune.model.base import fetch_base, fetch_tokenizer
from feyntune.model.packed import ATTENTION
from feyntune.telemetry import progress

if TYPE_CHECKING:
    from peft import PeftModel

Precision = Literal["fp32", "bf16", "fp16", "nf4"]

# The libraries' own bars and a word to peft's authors would stand between our lines.
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        UserError: there is none, or it has no BOS or EOS token.
    """
    folder = fetch_tokenizer(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(f"Base model {base}: its tokenizer cannot be loaded ({str(e).splitlines()[0]}).") from e
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"Base model {base}: its tokenizer has no {token}; set it in tokenizer_config.json.")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole document: BOS, the text, EOS (FeynTune trains on both).

    Built by hand: what a tokenizer adds by itself differs between models and versions.
    """
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the start of a document, to be completed: BOS and the text, no EOS."""
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def get_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU.

    Raises:
        UserError: there is none though FEYNTUNE_EXPECT_GPU is set, as the chart sets it where steps ask for GPUs.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("FEYNTUNE_EXPECT_GPU"):
        raise UserError(
            "This step was given GPUs but torch sees none: the node's driver does not reach the container, or its "
            "image is not the CUDA build. See docs/operate.md, GPU problems."
        )
    return torch.device("cpu")


def load_base(
    base: str, precision: Precision, device: torch.device | str, attention: str = ATTENTION
) -> PreTrainedModel:
    """The frozen base model on one device.

    Args:
        base: a folder, an `s3://` folder or a model id of the Hugging Face hub, with or without `@digest`.
        precision: "nf4" is 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314 §3), computing
            in bf16 on a GPU and in fp32 on a CPU, where bf16 is slower.
        attention: ATTENTION for packed documents, "sdpa" for generation.

    Raises:
        UserError: the model is not there, is not causal, or does not fit its tokenizer.
    """
    folder = fetch_base(base, precision)
    device = torch.device(device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    of = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": compute}
    options: dict[str, Any] = {"dtype": of[precision]}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None and precision != "nf4":
            raise UserError(f"Base model {base} is quantized: set precision to nf4, or name the original.")
        if quantized is not None:
            config.quantization_config = nf4(compute).to_dict()  # the copy was written on a CPU
        elif precision == "nf4":
            options["quantization_config"] = nf4(compute)
        with loading_shown(precision):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                attn_implementation=attention,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
    except (OSError, ValueError) as e:
        raise UserError(f"Base model {base} cannot be loaded as a causal model: {str(e).splitlines()[0]}") from e
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise UserError(f"Base model {base}: its weights are not those that its config.json describes.") from e
    if quantized is not None:
        _compute_in(model, compute)
    if device.type == "cpu":
        _keep_gradients_on_cpu(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return model


def _compute_in(model: torch.nn.Module, compute: torch.dtype) -> None:
    """Make a loaded quantized copy what quantizing on load gives: it keeps the precision that it was saved in."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = compute  # of dequantized weights
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization; products in `compute`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


@contextmanager
def loading_shown(precision: str) -> Iterator[None]:
    """Our progress in place of the library's bar: an 8B model takes minutes to load, to quantize on a CPU 20."""

    def show(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _counted(args[0], precision) if options.get("desc") == "Loading weights" else bar(*args, **options)

    before = transformers_logging.set_tqdm_hook(show)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _counted(tensors: Any, precision: str) -> Iterator[Any]:
    with progress(f"loading the base model in {precision}", len(tensors), "tensors") as bar:
        for tensor in tensors:
            yield tensor
            bar.advance()


def with_adapter(model: "PreTrainedModel | PeftModel", adapter: str | Path) -> "PeftModel":
    """`model` with the adapter of a folder in use, in eval mode. Adapters that it held before stay loaded."""
    from peft import PeftModel

    name = Path(adapter).resolve().as_posix().replace(".", "-")  # a module's name holds no dot
    if isinstance(model, PeftModel):
        model.load_adapter(str(adapter), adapter_name=name)
        model.set_adapter(name)
    else:
        model = PeftModel.from_pretrained(model, str(adapter), adapter_name=name)
    return model.eval()


def check_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for."""
    table: Any = model.get_input_embeddings()
    embedded = table.weight.shape[0]
    if len(tokenizer) > embedded:
        raise UserError(
            f"Base model {base}: the tokenizer has {len(tokenizer)} tokens, the model embeds {embedded}: use the "
            "tokenizer the model was trained with."
        )


def _keep_gradients_on_cpu(model: torch.nn.Module) -> None:
    """Switch off bitsandbytes' CPU packing.

    On CPUs with AVX512-bf16 `Linear4bit.forward` repacks its weight in eval mode and never unpacks it; the packed
    path has no gradient, so training after any evaluation would silently learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not declared by torch.nn.Module)
