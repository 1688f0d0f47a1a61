"""From tokens to text as they come: whole characters only, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of a growing list of tokens, without special tokens.

    What `add` and `end` return, put together, is exactly what decoding all tokens at once gives. After a prompt it
    is what comes to the prompt's text: decoders of SentencePiece drop a space at the start of what they decode, so
    the prompt's last token is decoded with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        before = self._tokenizer.decode(list(prompt[-1:]), skip_special_tokens=True)
        if before and not before.endswith("\ufffd"):  # neither a special token nor a part of a character
            self._ids.append(prompt[-1])
            self._stream.step(self._tokenizer, prompt[-1])
        self._skip = len(before) if self._ids else 0
        self.length = 0  # characters returned so far

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self.length += len(text)
        return text

    def end(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._skip + self.length :]


class Stopper:
    """Cuts a text at the first of its stop strings."""

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What may be shown now; the rest is held back while it could be the start of a stop string."""
        self._held += text
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            _, start = min(found)  # the one that is complete first, however the text was cut into tokens
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    @property
    def holding(self) -> bool:
        """Whether some text is held back."""
        return bool(self._held)

    def end(self) -> str:
        """What was held back and became no stop string."""
        shown, self._held = self._held, ""
        return shown
