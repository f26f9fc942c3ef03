"""Texts to token ids where nothing that a user wrote is read as a control token.

A tokenizer finds ``<|im_end|>`` or ``[SEP]`` in a text and makes the control token of it: whoever
writes the data could then end a turn, or a row. Here such a text stays text. Rows that hold no
control token keep the tokenizer's own ids; the few that do are encoded by a copy of the tokenizer in
which control tokens go by secret names, so that only what we put there is one. That covers ways
around ``split_special_tokens`` too: a unigram model has ``</s>`` among its words, and a normaliser
makes it of ``＜/s＞``.
"""

# pyright: standard
# tokenizers and transformers are typed in part.
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedft.core.errors import MismatchError

_LETTERS = [chr(code) for code in range(0xA000, 0xA400)]
"""Yi syllables: letters that have no case, no decomposition and no other width, so that no
normaliser changes a name made of them."""

_MARKED = re.compile(r"<.+>|\[.+\]")
"""What control tokens look like. Other tokens are taken for pieces of text."""


def _secret_names(tokens: Mapping[int, str]) -> dict[str, str]:
    """A name for each that nobody can guess, so that no text holds one."""
    nonce = "".join(secrets.choice(_LETTERS) for _ in range(8))
    return {
        t: f"{nonce}{_LETTERS[i // 1000]}{_LETTERS[i % 1000]}{nonce}" for i, t in tokens.items()
    }


@dataclass(frozen=True)
class Ids:
    """Some texts, encoded.

    Attributes:
        rows: token ids of each.
        cut: which of them were longer, bool [n].
        types: of each token whether it is of the first text or of the second, as the tokenizer marks
            it; None where it does not.
    """

    rows: list[list[int]]
    cut: NDArray[np.bool_]
    types: list[list[int]] | None = None


@dataclass(frozen=True)
class Words:
    """Some rows of words, encoded.

    Attributes:
        rows: token ids of each.
        cut: which of them were longer, bool [n].
        firsts: of each row the place of each word's first token, by the word's place.
    """

    rows: list[list[int]]
    cut: NDArray[np.bool_]
    firsts: list[dict[int, int]]


def _firsts(words: Sequence[int | None]) -> dict[int, int]:
    found: dict[int, int] = {}
    for token, word in enumerate(words):
        if word is not None:
            found.setdefault(word, token)
    return found


class PlainText:
    """Encodes texts with a tokenizer of transformers.

    Args:
        tokenizer: fast ones get all of the above. One that is written in Python only is asked not
            to look for its control tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        hidden = {i: t for i, t in (added | named).items() if self._hideable(t)}
        self._hidden = hidden
        self.control = frozenset(i for i in hidden if not self._is_unknown(i))
        """Ids that no text of a user gives. An unknown word is text."""
        self._table = np.zeros(max(hidden, default=0) + 1, np.bool_)
        self._table[list(self.control)] = True
        self._frame: list[int] = tokenizer("")["input_ids"]
        # The longest first: where two begin alike, the tokenizer takes the longer one.
        literal = sorted(map(re.escape, hidden.values()), key=len, reverse=True)
        self._found = re.compile("|".join(literal)) if literal else None
        self.controls = self._found
        """Finds control tokens in a text."""
        self._is_control = {token: i in self.control for i, token in hidden.items()}
        self._name_of = _secret_names(hidden)
        self._veiled = _secret_names(hidden)

    @property
    def written(self) -> frozenset[int]:
        """Control tokens that the tokenizer itself puts around a text."""
        return frozenset(self._frame)

    def reachable(self, token: int) -> bool:
        """Whether a text of a user, or its tokenizer, can put this token in a row."""
        if token in self.written or self._is_unknown(token):
            return True
        if token in self.control:
            return False
        word = str(self._tokenizer.convert_ids_to_tokens(token))
        return not _MARKED.fullmatch(word) or token in self.encode([word]).rows[0]

    def encode(
        self,
        texts: Sequence[str],
        *,
        special: bool = False,
        max_length: int | None = None,
        seconds: Sequence[str] | None = None,
    ) -> Ids:
        """Token ids of each text.

        Args:
            texts: as users wrote them.
            special: put around each what the tokenizer puts around a text, or around a pair.
            max_length: tokens at which a text is cut; None never cuts. Of a pair the longer text is.
            seconds: the second text of each, where rows are pairs; None where they are not.
        """
        if not len(texts):
            return Ids([], np.zeros(0, np.bool_))
        own = self._by_tokenizer(texts, special, max_length, seconds)
        usual = self._count([self._frame_of(seconds is not None)] if special else [[]])[0]
        suspect = self._count(own.rows) > usual
        if (found := self._found) is not None:
            for column in (texts, *([] if seconds is None else [seconds])):
                suspect |= np.array([found.search(text) is not None for text in column], bool)
        if not suspect.any():
            return own
        odd: list[int] = np.flatnonzero(suspect).tolist()
        others = None if seconds is None else [seconds[i] for i in odd]
        again = self._neutral([texts[i] for i in odd], special, max_length, others)
        for i, row, cut in zip(odd, again.rows, again.cut, strict=True):
            own.rows[i], own.cut[i] = row, cut
        if own.types is not None and again.types is not None:
            for i, types in zip(odd, again.types, strict=True):
                own.types[i] = types
        return own

    def _frame_of(self, pair: bool) -> list[int]:
        """What the tokenizer puts around a text, or around two."""
        if not pair:
            return self._frame
        return self._tokenizer([""], [""], verbose=False)["input_ids"][0]

    def words(self, rows: Sequence[Sequence[str]], max_length: int) -> Words:
        """Token ids of rows that are lists of words, with what the tokenizer puts around a text.

        Each word is encoded as it stands within a text: where the tokenizer tells words by the
        space before them, there is one before every word but the first. A row that is too long loses
        its last words.

        Args:
            rows: words, as users wrote them; none is empty.
            max_length: tokens at which a row is cut.

        Raises:
            MismatchError: the tokenizer cannot say which token is of which word.
        """
        neutral = self._copy
        if neutral is None:
            raise MismatchError(
                f"{type(self._tokenizer).__name__} cannot say which token is of which word: only "
                "a fast tokenizer can",
                fix="use a model whose folder has a tokenizer.json, or that transformers can convert",
            )
        space = self._space
        neutral.enable_truncation(max_length, direction="right")
        spaced = [[words[0], *(space + word for word in words[1:])] for words in rows]
        found = neutral.encode_batch(spaced, is_pretokenized=True, add_special_tokens=True)
        return Words(
            [row.ids for row in found],
            np.array([bool(row.overflowing) for row in found], bool),
            [_firsts(row.word_ids) for row in found],
        )

    @cached_property
    def _space(self) -> str:
        """What stands before a word within a text, where the tokenizer does not put it there itself."""
        self._copy.no_truncation()
        apart, within = (
            self._copy.encode(words, is_pretokenized=True, add_special_tokens=False).ids
            for words in (["a", "a"], ["a", " a"])
        )
        text = self._copy.encode("a a", add_special_tokens=False).ids
        return " " if text == within != apart else ""

    def rendered(
        self,
        render: Callable[[list[tuple[str, ...]]], list[tuple[str, ...]]],
        rows: Sequence[tuple[str, ...]],
        *,
        whole: bool = False,
    ) -> list[tuple[list[int], ...]]:
        """Token ids of what a template makes of users' texts. Its own control tokens are ones.

        Args:
            render: what users wrote, some texts a row → what the template makes of each row, in
                parts that are encoded apart.
            rows: what users wrote.
            whole: encode the parts of a row as one text. A token that is of two of them belongs to
                the one that has an odd place. Tokenizers that are written in Python only cannot
                tell, and encode them apart.
        """
        parts = render(list(rows))
        whole = whole and self._backend is not None
        ids = self._cut_up(parts, None) if whole else self._in_parts(parts, self._as_it_is)
        if (found := self._found) is None:
            return ids
        written = np.array([self._controls_in("".join(row)) for row in parts], np.int64)
        theirs = np.array([any(map(found.search, row)) for row in rows], bool)
        found_in = self._count([*chain(*row)] for row in ids)
        odd: list[int] = np.flatnonzero(theirs | (found_in > written)).tolist()
        if odd:
            veiled = render([tuple(map(self._veil, rows[i])) for i in odd])
            named = [tuple(self._unveil(self._named(t)) for t in row) for row in veiled]
            neutral = self._copy if whole else None
            again = (
                self._in_parts(named, lambda texts: self._neutral(texts, False, None).rows)
                if neutral is None
                else self._cut_up(named, neutral)
            )
            for i, row in zip(odd, again, strict=True):
                ids[i] = row
        return ids

    @staticmethod
    def _in_parts(
        rows: Sequence[tuple[str, ...]], encode: Callable[[list[str]], list[list[int]]]
    ) -> list[tuple[list[int], ...]]:
        flat = iter(encode([part for row in rows for part in row]))
        return [tuple(next(flat) for _ in row) for row in rows]

    def _cut_up(self, rows: Sequence[tuple[str, ...]], neutral: Any) -> list[tuple[list[int], ...]]:
        """Token ids of each row as one text, by part; by the tokenizer itself without ``neutral``."""
        texts = ["".join(parts) for parts in rows]
        if neutral is not None:
            neutral.no_truncation()
            encoded = [
                (row.ids, row.offsets)
                for row in neutral.encode_batch(texts, add_special_tokens=False)
            ]
        elif texts:
            found = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                split_special_tokens=False,
                verbose=False,
            )
            encoded = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
        else:
            encoded = []
        return [_by_part(parts, *own) for parts, own in zip(rows, encoded, strict=True)]

    def _as_it_is(self, texts: list[str]) -> list[list[int]]:
        return self._by_tokenizer(texts, False, None).rows

    # ------------------------------------------------------------------------------ names

    def _named(self, text: str) -> str:
        """Control tokens by their secret names."""
        assert self._found is not None
        return self._found.sub(lambda hit: self._name_of[hit[0]], text)

    def _veil(self, text: str) -> str:
        """A user's text in which a template's writing cannot be mistaken for the user's."""
        assert self._found is not None
        return self._found.sub(lambda hit: self._veiled[hit[0]], text)

    def _unveil(self, text: str) -> str:
        for token, veil in self._veiled.items():
            text = text.replace(veil, token)
        return text

    def _controls_in(self, text: str) -> int:
        assert self._found is not None
        return sum(self._is_control[hit] for hit in self._found.findall(text))

    # --------------------------------------------------------------------------- encoding

    def _by_tokenizer(
        self,
        texts: Sequence[str],
        special: bool,
        limit: int | None,
        seconds: Sequence[str] | None = None,
    ) -> Ids:
        """As the tokenizer does it when it looks for control tokens."""
        return self._encoded(texts, special, limit, {"split_special_tokens": False}, seconds)

    def _encoded(
        self,
        texts: Sequence[str],
        special: bool,
        limit: int | None,
        options: dict[str, Any],
        seconds: Sequence[str] | None,
    ) -> Ids:
        typed = seconds is not None and "token_type_ids" in self._tokenizer.model_input_names
        encoded = self._tokenizer(
            list(texts),
            None if seconds is None else list(seconds),
            add_special_tokens=special,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=typed,
            # A prompt may well be longer than the model takes: that is measured and refused.
            verbose=False,
            **options,
        )
        rows: list[list[int]] = encoded["input_ids"]
        full = [] if limit is None else [i for i, row in enumerate(rows) if len(row) >= limit]
        cut = np.zeros(len(rows), np.bool_)
        if encoded.encodings is not None:
            cut[full] = [bool(encoded.encodings[i].overflowing) for i in full]
        elif full:
            others = None if seconds is None else [seconds[i] for i in full]
            whole = self._encoded([texts[i] for i in full], special, None, options, others).rows
            cut[full] = [len(row) > len(rows[i]) for i, row in zip(full, whole, strict=True)]
        return Ids(rows, cut, encoded["token_type_ids"] if typed else None)

    def _neutral(
        self,
        texts: Sequence[str],
        special: bool,
        limit: int | None,
        seconds: Sequence[str] | None = None,
    ) -> Ids:
        """As the tokenizer does it where control tokens go by their secret names."""
        neutral = self._copy
        if neutral is None:
            return self._encoded(texts, special, limit, {"split_special_tokens": True}, seconds)
        if limit is None:
            neutral.no_truncation()
        else:
            neutral.enable_truncation(limit, direction=self._tokenizer.truncation_side)
        rows = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
        encoded = neutral.encode_batch(rows, add_special_tokens=special)
        cut = np.array([bool(row.overflowing) for row in encoded], bool)
        return Ids([row.ids for row in encoded], cut, [row.type_ids for row in encoded])

    def _count(self, rows: Iterable[Sequence[int]]) -> NDArray[np.int64]:
        """Control tokens in each row. [n]"""
        rows = list(rows)
        lengths = np.array([len(row) for row in rows], np.int64)
        flat = np.fromiter((i for row in rows for i in row), np.int64, int(lengths.sum()))
        hits = self._table[np.minimum(flat, len(self._table) - 1)] & (flat < len(self._table))
        ends = np.cumsum(np.concatenate([[0], hits]))
        stops = np.cumsum(lengths)
        return ends[stops] - ends[stops - lengths]

    # --------------------------------------------------------------------------- the copy

    @property
    def _backend(self) -> Any:
        return getattr(self._tokenizer, "backend_tokenizer", None)

    def _hideable(self, token: str) -> bool:
        """Whether a tokenizer can do without this string as a word of its own.

        One character, or what merges give, is also plain text: a tokenizer whose padding is ``!``
        still has to write ``!``.
        """
        if len(token) < 2 or not token.strip():
            return False
        if self._backend is None or type(self._backend.model).__name__ != "BPE":
            return True
        return token not in self._merged

    @cached_property
    def _merged(self) -> frozenset[str]:
        """Of the control tokens those that a BPE model puts together out of smaller ones."""
        model = self._backend.model
        named = [str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        ignores, model.ignore_merges = model.ignore_merges, False
        try:
            return frozenset(t for t in named if [p.value for p in model.tokenize(t)] == [t])
        finally:
            model.ignore_merges = ignores

    def _is_unknown(self, token: int) -> bool:
        """Whether this is what the tokenizer writes for what it does not know."""
        if token != self._tokenizer.unk_token_id:
            return False
        model = getattr(self._backend, "model", None)
        if getattr(model, "byte_fallback", False):
            return False
        if type(model).__name__ == "Unigram":
            return True
        return model is None or bool(getattr(model, "unk_token", None))

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with secret names; None where it is not a fast one, or cannot be copied."""
        if self._backend is None:
            return None
        from tokenizers import Tokenizer

        state = json.loads(self._backend.to_str())
        state["truncation"] = state["padding"] = None
        for token in state["added_tokens"]:
            token["content"] = self._name_of.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._name_of.get(t, t): i for t, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._name_of.get(t, t), score] for t, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._name_of.get(model["unk_token"], model["unk_token"])
        copied = Tokenizer.from_str(json.dumps(state))
        same = all(copied.token_to_id(self._name_of[t]) == i for i, t in self._hidden.items())
        return copied if same else None


def _by_part(
    parts: Sequence[str], ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> tuple[list[int], ...]:
    """The tokens of a text by the part of it that they are of."""
    found: list[list[int]] = [[] for _ in parts]
    ends = list(accumulate(map(len, parts)))
    place = 0
    for token, (first, stop) in zip(ids, offsets, strict=True):
        while place < len(parts) - 1 and first >= ends[place]:
            place += 1
        if place % 2 == 0 and place < len(parts) - 1 and stop > ends[place] and parts[place + 1]:
            place += 1
        found[place].append(token)
    return tuple(found)
