"""Captions to token ids: open_clip's byte-pair tokenizer, with CLIP's vocabulary or another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .images import Rejected

if TYPE_CHECKING:
    from .clip_tokenizer import SimpleTokenizer

CLIP = "clip"
"""The tokenizer of CLIP and of all open_clip models that do not name another: 49,408 ids."""
CHARACTERS_PER_TOKEN = 32
"""No token of CLIP's is longer; text beyond context x this cannot reach the tokens and is not tokenised."""
MAX_WORDS = 1 << 17
"""Words whose tokens a process keeps in memory."""


def tokenize(caption: str, context: int, tokenizer: str = CLIP) -> tuple[np.ndarray, bool]:
    """int32 [context]: start, words, end, zeros, as open_clip's tokenizer gives them; and whether words were cut off.

    A caption that is too long keeps the end token, in the last place. tokenizer: see `tokenizer_options`.
    """
    encoder = _tokenizer(tokenizer)
    if len(encoder.cache) > MAX_WORDS:  # it remembers every word it has met
        encoder.cache = {encoder.decoder[i]: encoder.decoder[i] for i in encoder.all_special_ids}
    words = encoder.encode(caption.lstrip()[: context * CHARACTERS_PER_TOKEN])  # blanks before it are no words
    kept = [encoder.sot_token_id, *words[: context - 2], encoder.eot_token_id]
    tokens = np.zeros(context, np.int32)
    tokens[: len(kept)] = kept
    return tokens, len(words) > context - 2


def text_of(tokens: np.ndarray, tokenizer: str = CLIP) -> str:
    """The words of one caption, integers [n] up to the end token: what `tokenize` makes the same ids of (it writes in
    small letters). Raises Rejected where the tokenizer does not know an id."""
    encoder = _tokenizer(tokenizer)
    if unknown_ids(tokens, encoder.vocab_size).any():
        raise Rejected("caption with token ids that the tokenizer (data.tokenizer) does not know")
    ends = np.flatnonzero(tokens == encoder.eot_token_id)
    words = tokens[: ends[0]] if ends.size else tokens
    special = set(encoder.all_special_ids)
    return encoder.decode([i for i in words.tolist() if i not in special]).strip()


def unknown_ids(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Which of some token ids are not in 0 .. vocabulary - 1: bool, of the same shape."""
    return (tokens < 0) | (tokens >= vocabulary)


def check_ids(tokens: np.ndarray, vocabulary: int, name: Callable[[int], str]) -> None:
    """Raises DataError where captions, integers [B, context], hold an id that the model has no embedding for; name: of
    a sample of the batch, by its place."""
    if tokens.min() >= 0 and tokens.max() < vocabulary:
        return
    rows, places = np.nonzero(unknown_ids(tokens, vocabulary))
    raise DataError(
        f"{name(int(rows[0]))}: its caption has the token id {tokens[rows[0], places[0]]}, the text tower knows "
        f"{vocabulary}: set model.text.vocabulary to the size of the tokenizer's, or prepare the captions again"
    )


@cache
def _tokenizer(name: str) -> SimpleTokenizer:
    from .clip_tokenizer import SimpleTokenizer  # seconds: only those who tokenise pay them

    try:
        return SimpleTokenizer(**tokenizer_options(name))
    except (OSError, ValueError, IndexError, TypeError, EOFError) as error:
        raise DataError(f"--tokenizer {name}: not a list of byte-pair merges: {error}") from None


def tokenizer_options(name: str) -> dict[str, Any]:
    """The options of open_clip's `SimpleTokenizer` for "clip", an open_clip model's name, or a file of merges.

    The file is in the format of CLIP's `bpe_simple_vocab_16e6.txt.gz`: compressed, a heading, then a merge a line.
    Raises DataError where the name is none of these, or a model whose tokenizer is of another kind.
    """
    if name == CLIP:
        return {}
    if Path(name).is_file():
        return {"bpe_path": name}
    config = _model_config(name)
    if config is None:
        raise DataError(f"--tokenizer {name}: neither '{CLIP}', nor an open_clip model, nor a file of byte-pair merges")
    text = config.get("text_cfg", {})
    if text.get("hf_tokenizer_name"):
        raise DataError(
            f"--tokenizer {name}: its tokenizer ({text['hf_tokenizer_name']}) has no start and end ids as CLIP's; "
            f"give '{CLIP}', or a file of byte-pair merges"
        )
    return {key: value for key, value in text.get("tokenizer_kwargs", {}).items() if key == "clean"}


def _model_config(name: str) -> dict[str, Any] | None:
    """open_clip's description of a model, without the seconds that importing it takes."""
    from .clip_tokenizer import open_clip_folder

    path = open_clip_folder() / "model_configs" / f"{name.replace('/', '-')}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def tokenizer_identity(name: str) -> str:
    """What the ids depend on: the name, or the content of a file. Raises DataError as `tokenizer_options` does."""
    options = tokenizer_options(name)
    return sha256(Path(name).read_bytes()).hexdigest() if "bpe_path" in options else json.dumps(options)
