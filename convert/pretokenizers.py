"""Which of llama.cpp's pre-tokenizers splits text as a byte-level tokenizer.json does, found from its rules rather than from the model's name.

llama.cpp has its regular expressions built in and selects them by a name (``tokenizer.ggml.pre``), which also says whether a word that is a token as a
whole skips the merges. Where several names mean the same (``smollm``, ``starcoder``, ``refact``), one is given. Sources: the rules are those of the
published tokenizer.json files, what each name does is in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from typing import Any

from gearcpp.errors import UnsupportedError

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINE_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_GROUPED = _GPT2.replace("'s|'t|'re|'ve|'m|'ll|'d", "'(?:[sdmt]|ll|ve|re)")
_ONE_DIGIT = r"\p{N}"


def _words(digits: str) -> str:
    """The rules of GPT-4 (cl100k), which Llama 3 and Qwen 2 share but for the length of numbers."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINE_ENDS}"


def _cased_words(contraction: str, digits: str) -> str:
    """The rules of GPT-4o (o200k), which Mistral's Tekken shares: words are cut where lower case turns into upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return rf"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINE_ENDS}"


def _marked_words(digits: str) -> str:
    """The same with combining marks as parts of words (Qwen 3.5)."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{digits}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINE_ENDS}"


# DeepSeek-V3: numbers, then Chinese and Japanese, then words with what stands before them.
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|""" + _LINE_ENDS,
)
_CL100K = _words(r"\p{N}{1,3}")

# rules in order -> (name for merges always, name for whole words first)
_NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (_GPT2,): ("gpt-2", None),
    (_GPT2_GROUPED,): ("gpt-2", None),
    (_ONE_DIGIT, _GPT2): ("smollm", None),
    (_words(_ONE_DIGIT),): ("qwen2", None),
    (_marked_words(_ONE_DIGIT),): ("qwen35", None),
    (_CL100K,): ("dbrx", "llama-bpe"),
    (_cased_words(f"{_CONTRACTION}?", r"\p{N}{1,3}"),): ("gpt-4o", None),
    (_cased_words("", _ONE_DIGIT),): (None, "tekken"),
    _DEEPSEEK3: ("deepseek-v3", None),
}

# Whose expressions in llama.cpp say letter where the tokenizer says letter or mark.
WITHOUT_COMBINING_MARKS = ("gpt-4o", "tekken")

PRE_TOKENIZERS = tuple(sorted({name for names in _NAMES.values() for name in names if name}))


def recognise(pre_tokenizer: dict[str, Any] | None, whole_words_first: bool, merges_make_all: bool) -> str:
    """The name of llama.cpp's pre-tokenizer for the ``pre_tokenizer`` of a byte-level tokenizer.json.

    whole_words_first: the model's ``ignore_merges``; merges_make_all: every token is the result of some merge, so that this flag changes nothing.

    Raises:
        UnsupportedError: rules that llama.cpp does not have, named in the message.
    """
    rules = tuple(rule for step in steps(pre_tokenizer) for rule in _rules(step))
    always, whole_first = _NAMES.get(rules, (None, None))
    exact, other = (whole_first, always) if whole_words_first else (always, whole_first)
    if exact or (other and merges_make_all):
        return exact or other or ""
    raise UnsupportedError(
        f"the tokenizer splits text by rules that llama.cpp is not known to have: {' then '.join(rules) or 'none'}"
        f"{' (ignore_merges)' if whole_words_first else ''}; if one of its pre-tokenizers does the same, name it with --pre"
        f" (this converter knows {', '.join(PRE_TOKENIZERS)})"
    )


def steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, which may be none, one, or a sequence."""
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _rules(step: dict[str, Any]) -> list[str]:
    """One step as the regular expressions by which it splits."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False} | {"type": "ByteLevel", "use_regex": False}:
            return [_GPT2] if step.get("use_regex", True) else []
        case {"type": "Digits", "individual_digits": True}:
            return [_ONE_DIGIT]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False} | {
            "type": "Split",
            "pattern": {"Regex": str(regex)},
            "behavior": "Removed",
            "invert": True,
        }:
            return [regex.replace("\r", r"\r").replace("\n", r"\n")]  # some files have the line ends themselves
    raise UnsupportedError(f"the tokenizer's pre-tokenizer step {step} has no equivalent in llama.cpp; force one with --pre if you know it to do the same")
