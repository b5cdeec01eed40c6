"""Tokenizer files read: tokenizer.json (byte-level BPE, or SentencePiece's BPE as transformers writes it) and tokenizer.model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from gearcpp.errors import ConfigError, DataError, GearError, UnsupportedError

from .config import read_json
from .pretokenizers import WITHOUT_COMBINING_MARKS, recognise, steps
from .vocabulary import Vocabulary, chat_template, set_special_ids

_SPACE = "▁"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_WORD_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")
_MOST_GAPS = 1_000_000  # ids without a token

Merges = list[tuple[str, str]]


def read_vocabulary(folder: Path, config_json: Mapping[str, Any], forced_pre: str | None = None, pieces: str = "llama") -> Vocabulary:
    """The tokenizer of a folder: tokenizer.json, which is what transformers uses, or tokenizer.model where there is no such file.

    pieces: what llama.cpp calls a SentencePiece-like tokenizer of this model, see `Architecture.pieces`.

    Raises:
        DataError: no tokenizer, or a damaged one.
        UnsupportedError: a kind of tokenizer, or rules of splitting, that llama.cpp does not have.
    """
    if tokenizer := read_json(folder / "tokenizer.json"):
        try:
            vocabulary = _from_json(tokenizer, forced_pre, pieces)
        except GearError:
            raise
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'tokenizer.json'} is damaged: {type(error).__name__} {error}") from error
    elif pieces != "llama":
        raise DataError(f"{folder} has no tokenizer.json, whose merges this model's tokenizer needs")
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _from_sentencepiece(folder)
    else:
        raise DataError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    set_special_ids(vocabulary, folder, config_json)
    vocabulary.chat_template = chat_template(folder)
    return vocabulary


# ---- tokenizer.json


def _from_json(tokenizer: Mapping[str, Any], forced_pre: str | None, pieces: str) -> Vocabulary:
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"tokenizer.json holds a {model['type']} model: only BPE (byte-level, or SentencePiece's with byte fallback) can be converted"
        )
    if marked := [name for name in _WORD_MARKS if model.get(name)]:
        raise UnsupportedError(f"the tokenizer marks parts of words ({marked[0]} = {model[marked[0]]!r}), which llama.cpp does not do")
    if forced_pre and model.get("byte_fallback"):
        raise ConfigError("pre is for byte-level tokenizers, this is SentencePiece's")
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(left, right) for left, right in pairs]
    vocabulary = _sentencepiece_bpe(tokenizer, merges, pieces) if model.get("byte_fallback") else _byte_level_bpe(tokenizer, merges, forced_pre)
    added = tokenizer.get("added_tokens") or []
    for token in added:
        if vocabulary.special_ids.get("unk") != token["id"]:
            vocabulary.add(token["id"], token["content"], token["special"])
    if stripping := [token["content"] for token in added if token.get("lstrip") or token.get("rstrip")]:
        vocabulary.notices.append(
            f"{len(stripping)} added tokens (such as {stripping[0]}) take the spaces beside them; llama.cpp does that for Phi-3 only"
        )
    _apply_template(vocabulary, tokenizer.get("post_processor"))
    return vocabulary


def _tokens_by_id(vocab: Mapping[str, int]) -> tuple[list[str], list[TokenType]]:
    by_id = {index: token for token, index in vocab.items()}
    n_tokens = max(by_id) + 1
    if n_tokens > len(by_id) + _MOST_GAPS:
        raise DataError(f"tokenizer.json has {len(by_id)} tokens, but one of them has the id {n_tokens - 1}")
    return (
        [by_id.get(index, f"[PAD{index}]") for index in range(n_tokens)],
        [TokenType.NORMAL if index in by_id else TokenType.UNUSED for index in range(n_tokens)],
    )


def _byte_level_bpe(tokenizer: Mapping[str, Any], merges: Merges, forced_pre: str | None) -> Vocabulary:
    if (normalizer := tokenizer.get("normalizer")) and normalizer["type"] != "NFC":
        raise UnsupportedError(f"the tokenizer normalizes text by {normalizer['type']}, which llama.cpp does not do for byte-level BPE")
    tokens, types = _tokens_by_id(tokenizer["model"]["vocab"])
    vocabulary = Vocabulary("gpt2", "", tokens, types, merges=[f"{left} {right}" for left, right in merges])
    if normalizer:
        vocabulary.notices.append("the tokenizer composes characters first (NFC); llama.cpp does not, so text in decomposed form gets other tokens")
    made = {left + right for left, right in merges} | {token["content"] for token in tokenizer.get("added_tokens") or []}
    merges_make_all = all(len(token) == 1 or token in made for token in tokenizer["model"]["vocab"])
    vocabulary.pre = forced_pre or recognise(tokenizer.get("pre_tokenizer"), bool(tokenizer["model"].get("ignore_merges")), merges_make_all)
    if vocabulary.pre in WITHOUT_COMBINING_MARKS:
        vocabulary.notices.append(f"llama.cpp's {vocabulary.pre} cuts words at combining marks (Hindi, Thai ...), the tokenizer does not")
    return vocabulary


def _sentencepiece_bpe(tokenizer: Mapping[str, Any], merges: Merges, pieces: str) -> Vocabulary:
    model = tokenizer["model"]
    tokens, types = _tokens_by_id(model["vocab"])
    by_scores = pieces == "llama"
    vocabulary = Vocabulary(pieces, "default" if by_scores else pieces, tokens, types)
    vocabulary.scores = _scores_of_merges(tokens, merges)
    if not by_scores:
        vocabulary.merges = [f"{left} {right}" for left, right in merges]
    for index, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            types[index] = TokenType.BYTE
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types[unknown] = TokenType.UNKNOWN
        vocabulary.special_ids["unk"] = unknown
    if TokenType.BYTE not in types:
        raise UnsupportedError("the tokenizer falls back to bytes but has no tokens <0x00> ... <0xFF>, which llama.cpp needs")
    vocabulary.flags["add_space_prefix"] = _adds_space_prefix(tokenizer, tokens, vocabulary.notices)
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    if by_scores:
        vocabulary.notices += _merge_notices((token for token in model["vocab"] if token not in added and not _BYTE.fullmatch(token)), merges)
    return vocabulary


def _scores_of_merges(tokens: Iterable[str], merges: Merges) -> list[float]:
    """llama.cpp joins the neighbours whose token has the highest score: the rank of the first merge that makes it, negated."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _merge_notices(vocab: Iterable[str], merges: Merges) -> list[str]:
    """SentencePiece may join any two neighbours that make a token; tokenizers joins listed pairs. Say so where the list is not complete."""
    known, listed = set(vocab), set(merges)
    for token in sorted(known):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known and (left, right) not in listed:
                return [f"the tokenizer's merges leave out pairs such as {left!r} + {right!r}; llama.cpp joins them, so some tokens can differ"]
    return []


def _adds_space_prefix(tokenizer: Mapping[str, Any], tokens: Iterable[str], notices: list[str]) -> bool:
    """Whether text gets a space before it, from the ways in which transformers has written SentencePiece's rules.

    Raises:
        UnsupportedError: rules beyond those.
    """
    prefix = False
    normalizer = tokenizer.get("normalizer")
    for step in (normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]) if normalizer else []:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise UnsupportedError(f"the tokenizer normalizes text by {step['type']}, which llama.cpp does not do")
    for step in steps(tokenizer.get("pre_tokenizer")):
        match step:
            case {"type": "Metaspace", "replacement": "▁"}:
                if step.get("split", True) and any(_SPACE in token[1:] for token in tokens):
                    raise UnsupportedError("the tokenizer splits text at spaces but has tokens across spaces, which llama.cpp would use")
                prefix = step.get("prepend_scheme", "always") != "never"
                if step.get("prepend_scheme") == "first":
                    notices.append("llama.cpp also puts a space before text that follows a special token, the tokenizer only at the start")
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass  # spaces are ▁ by then: nothing to split
            case _:
                raise UnsupportedError(f"the tokenizer's pre-tokenizer step {step} has no equivalent in llama.cpp's SentencePiece")
    return prefix


def _apply_template(vocabulary: Vocabulary, post_processor: Mapping[str, Any] | None) -> None:
    """What is put around a text: BOS, EOS, or nothing."""
    processors = post_processor.get("processors", [post_processor]) if post_processor else []
    template: Mapping[str, Any] = next((processor for processor in processors if processor["type"] == "TemplateProcessing"), {"single": []})
    around: dict[str, list[int]] = {"bos": [], "eos": []}
    side = "bos"
    for entry in template["single"]:
        if "Sequence" in entry:
            side = "eos"
        else:
            around[side] += template["special_tokens"][entry["SpecialToken"]["id"]]["ids"]
    for name, ids in around.items():
        if len(ids) > 1:
            raise UnsupportedError(f"the tokenizer puts {len(ids)} tokens around a text at the side of {name}; llama.cpp can put one")
        vocabulary.flags[f"add_{name}_token"] = bool(ids)
        if ids:
            vocabulary.special_ids[name] = ids[0]


# ---- tokenizer.model


def _from_sentencepiece(folder: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder / 'tokenizer.model'} is damaged: {error}") from error
    indices = range(pieces.vocab_size())
    vocabulary = Vocabulary("llama", "default", [pieces.id_to_piece(index) for index in indices], [_piece_type(pieces, index) for index in indices])
    vocabulary.scores = [pieces.get_score(index) for index in indices]
    _check_sentencepiece(pieces, vocabulary)
    settings = read_json(folder / "tokenizer_config.json")
    added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    added |= {index: {"content": text} for text, index in read_json(folder / "added_tokens.json").items() if index not in added}
    for index, token in sorted(added.items()):
        if index != pieces.unk_id():
            vocabulary.add(index, token["content"], token.get("special", False))
    vocabulary.special_ids |= {name: index for name, index in (("bos", pieces.bos_id()), ("eos", pieces.eos_id()), ("unk", pieces.unk_id())) if index >= 0}
    vocabulary.flags = {
        "add_bos_token": settings.get("add_bos_token", True),
        "add_eos_token": settings.get("add_eos_token", False),
        "add_space_prefix": pieces.encode("a", out_type=str)[0].startswith(_SPACE),
    }
    return vocabulary


def _piece_type(pieces: Any, index: int) -> TokenType:
    if pieces.is_unknown(index):
        return TokenType.UNKNOWN
    if pieces.is_control(index):
        return TokenType.CONTROL
    if pieces.is_byte(index):
        return TokenType.BYTE
    return TokenType.UNUSED if pieces.is_unused(index) else TokenType.NORMAL


def _check_sentencepiece(pieces: Any, vocabulary: Vocabulary) -> None:
    if any(score != round(score) for score, kind in zip(vocabulary.scores, vocabulary.types, strict=True) if kind == TokenType.NORMAL):
        raise UnsupportedError("tokenizer.model is a unigram model (its scores are no ranks): only SentencePiece's BPE can be converted")
    if pieces.normalize("ﬁ  x").strip(_SPACE) != f"ﬁ{_SPACE}{_SPACE}x":
        raise UnsupportedError("tokenizer.model normalizes text (NFKC, or spaces joined), which llama.cpp does not do")
