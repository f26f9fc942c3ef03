"""Padding and the end of text of a pretrained model: decided here, for all that asks.

The tokenizer decides, and the configuration in memory follows. A head on a decoder reads a row at
its last token that is not ``config.pad_token_id``: what pads must therefore never be written in a
row. Where the tokenizer has no such padding token, or one that its model has no embedding for, the
first of these takes its place: the configuration's, a token called *pad*, the end of text, another
control token, and a new token in a spare row of the embedding.
"""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedft.core.errors import MismatchError
from fedft.core.text.plain_text import PlainText

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]


@dataclass(frozen=True)
class SpecialTokens:
    """What pads rows and what ends answers.

    Attributes:
        pad: token id of padding.
        end: appended to an answer that has not ended; None where there is no such token.
        ends: any of these ends an answer; ``end`` is among them.
        side: where rows are padded that a head reads one token of.
    """

    pad: int
    end: int | None
    ends: frozenset[int]
    side: Side = "right"

    def facts(self) -> dict[str, object]:
        """For the record, as JSON data."""
        return {"pad": self.pad, "end": self.end, "ends": sorted(self.ends), "side": self.side}

    def follow(self, model: "nn.Module") -> None:
        """Make a model's configurations say the same, that of generation too.

        Layers stay as they were made: an embedding that counts positions from its padding row, as
        RoBERTa's, still does.
        """
        whole: Any = model.config
        for config in (whole, whole.get_text_config()):
            config.pad_token_id = self.pad
            if self.end is not None:
                config.eos_token_id = self.end
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.pad_token_id = self.pad
            if self.end is not None:
                others = sorted(self.ends - {self.end})
                generation.eos_token_id = [self.end, *others] if others else self.end


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, and what was decided about its special tokens.

    Attributes:
        tokenizer: its padding token and, where a head reads one token of a row, its padding side
            are as decided.
        special: the decision.
        plain: encodes what users wrote.
    """

    tokenizer: "PreTrainedTokenizerBase"
    special: SpecialTokens
    plain: PlainText

    def files(self) -> dict[str, bytes]:
        """The tokenizer as ``save_pretrained`` writes it, by file name."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    @staticmethod
    def of(tokenizer: "PreTrainedTokenizerBase | TextEncoder") -> "TextEncoder":
        """That of a tokenizer whose model is not known."""
        if isinstance(tokenizer, TextEncoder):
            return tokenizer
        plain = PlainText(tokenizer)
        pad, end = _id(tokenizer.pad_token_id), _id(tokenizer.eos_token_id)
        padding = next(token for token in (pad, end, 0) if token is not None)
        ends = frozenset[int]() if end is None else frozenset({end})
        return TextEncoder(tokenizer, SpecialTokens(padding, end, ends), plain)


def text_encoder(folder: Path, *, pools: bool) -> TextEncoder:
    """The tokenizer of a model, with padding and end of text decided.

    Args:
        folder: of the model.
        pools: whether a head reads one token of a row, as :attr:`fedft.core.tasks.Task.pools` says.

    Raises:
        MismatchError: ``pools``, and nothing could pad rows without being taken for text.
    """
    from transformers import AutoTokenizer

    key = _key(folder, pools)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    about = _About(tokenizer, PlainText(tokenizer), _read(folder, "config.json"), folder)
    end = about.end()
    ends = about.ends() | ({end} if end is not None else set())
    side: Side = "right"
    if pools:
        pad = about.unmistakable(end)
        tokenizer.padding_side = side = "left" if reads_last(about.config) else "right"
    else:
        pad = next((t for t in (*about.declared(), end) if t is not None), 0)
    if tokenizer.pad_token_id != pad and about.is_special(pad):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    _decided[key] = special = SpecialTokens(pad, end, frozenset(ends), side)
    return TextEncoder(tokenizer, special, PlainText(tokenizer))


def special_tokens(folder: Path, *, pools: bool) -> SpecialTokens | None:
    """The same decision for whoever loads the model; None where it has no tokenizer."""
    if not any(list(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return None
    key = _key(folder, pools)
    return _decided[key] if key in _decided else text_encoder(folder, pools=pools).special


def reads_last(config: Any) -> bool:
    """Whether a head reads the last column, padding or not, as XLNet's: rows are padded before it.

    Args:
        config: of the model, as an object or as JSON data.
    """

    def get(name: str, default: str) -> Any:
        return (config.get if isinstance(config, dict) else partial(getattr, config))(name, default)

    return get("model_type", "") == "xlnet" and get("summary_type", "last") == "last"


_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "spiece*", "sentencepiece*", "tekken.json")

_decided: dict[tuple[object, ...], SpecialTokens] = {}
"""Decisions by the model's files: a worker reads its data first and loads the model then."""


def _key(folder: Path, pools: bool) -> tuple[object, ...]:
    files = sorted(path for path in folder.glob("*.json"))
    stats = ((path.name, path.stat()) for path in files)
    return folder, pools, *((name, s.st_size, s.st_mtime_ns) for name, s in stats)


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class _About:
    """What can be read of a model and its tokenizer."""

    tokenizer: Any
    plain: PlainText
    config: Mapping[str, Any]
    folder: Path

    def end(self) -> int | None:
        """The tokenizer's end of text, else the configuration's, else what separates texts."""
        own, others = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
        candidates = (self._known(own), *self._configured_ends(), self._known(others))
        return next((token for token in candidates if token is not None), None)

    def ends(self) -> frozenset[int]:
        return frozenset(self._configured_ends())

    def declared(self) -> Iterator[int]:
        """Padding as the tokenizer has it, then as the configuration has it."""
        if (own := self._known(self.tokenizer.pad_token_id)) is not None:
            yield own
        configured = self._known(self._text_config.get("pad_token_id"))
        if configured is not None and self.is_special(configured):
            yield configured

    def is_special(self, token: int) -> bool:
        """Whether a tokenizer can be told that this is a control token, with texts as before."""
        return (
            token in self.plain.control
            or token in self.tokenizer.all_special_ids
            or (not self.plain.reachable(token))
        )

    def unmistakable(self, end: int | None) -> int:
        """A token that pads rows and can never be written in one."""
        for token in self._candidates(end):
            if not self.plain.reachable(token):
                return token
        if len(self.tokenizer) < self._rows:
            taken = self.tokenizer.get_vocab()
            name = next(n for n in ("<pad>", "<|pad|>", "<|padding|>") if n not in taken)
            self.tokenizer.add_special_tokens({"pad_token": name})
            return self.tokenizer.pad_token_id
        if self._pools:
            raise MismatchError(
                f"the tokenizer in {self.folder} has no token that could pad rows: each of its special "
                "tokens is also written in rows, and the model's embedding has no row to spare",
                fix="Add a padding token to the tokenizer, and a row to the embedding; save both.",
            )
        return next((t for t in (*self.declared(), end) if t is not None), 0)

    def _candidates(self, end: int | None) -> Iterator[int]:
        yield from self.declared()
        vocabulary = self.tokenizer.get_vocab()
        control = sorted(t for t in self.plain.control if self._known(t) is not None)
        named = [vocabulary.get(name) for name in ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")]
        named += [t for t in control if "pad" in self.tokenizer.convert_ids_to_tokens(t).lower()]
        yield from (token for t in (*named, end) if (token := self._known(t)) is not None)
        yield from control

    def _configured_ends(self) -> Iterator[int]:
        """Ends of text that the configurations name, and that can be nothing else here."""
        names = ("pad_token_id", "cls_token_id", "mask_token_id", "unk_token_id")
        taken = {getattr(self.tokenizer, name) for name in names} - {self.tokenizer.eos_token_id}
        generation = _read(self.folder, "generation_config.json")
        for source in (self.config, self._text_config, generation):
            found = source.get("eos_token_id")
            for value in found if isinstance(found, list) else [found]:
                token = self._known(value)
                if token is not None and token not in taken and self._ends_only(token):
                    yield token

    def _ends_only(self, token: int) -> bool:
        return token in self.plain.control or not self.plain.reachable(token)

    def _known(self, value: object) -> int | None:
        """A token id that the tokenizer has a token for, and the model an embedding."""
        token = _id(value)
        if token is None or not 0 <= token < min(len(self.tokenizer), self._rows):
            return None
        return token

    @property
    def _text_config(self) -> Mapping[str, Any]:
        return self.config.get("text_config") or self.config

    @property
    def _rows(self) -> int:
        return int(self._text_config.get("vocab_size") or len(self.tokenizer))

    @property
    def _pools(self) -> bool:
        """Whether the head on this model reads a row at its last token that is not padding."""
        import transformers
        from transformers.models.auto import modeling_auto

        names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        head = getattr(transformers, str(names.get(self.config.get("model_type", ""))), None)
        return head is not None and "pad_token_id" in inspect.getsource(head.forward)


def _id(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
