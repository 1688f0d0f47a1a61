"""From tokens to text as they come: whole characters only, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of a growing list of tokens, without special tokens.

    What `add` and `end` return, put together, is what decoding all tokens at once gives, but for bytes that turn out
    to be no character after text was returned. After a prompt it
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
        self._skip = len(before) if self._ids else 0  # characters of `_ids` that are not of the text, or returned
        self._pending: list[int] = []  # tokens that have given no text yet
        self.length = 0  # characters returned so far

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
            self._skip += len(text)
        except Exception:  # no class of its own: bytes that came later changed what earlier ones decode to
            text = self._restart()
        if text:
            self._pending = []
        self.length += len(text)
        return text

    def _restart(self) -> str:
        """The text of the pending tokens, decoded apart from those before; the stream begins again after them.

        With byte fallback (Llama 2, Mistral) a newline is a byte: `<0x0A>` and then a byte that begins no character
        decode to two U+FFFD, where the newline was returned already.
        """
        text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        before = self._tokenizer.id_to_token(self._pending[0]) or ""
        if before.startswith("\u2581") and not text.startswith(" "):  # dropped at the start of what is decoded
            text = " " + text
        self._ids = self._pending[-1:]
        self._skip = len(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stream.step(self._tokenizer, self._ids[0])
        return text

    def end(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._skip :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Stopper:
    """Cuts a text at the first of its stop strings."""

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What may be shown now; the rest is held back while it could be the start of a stop string."""
        self._held += text
        matches = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if matches:
            self.stopped = True
            _, start = min(matches)  # the one that is complete first, however the text was cut into tokens
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
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
