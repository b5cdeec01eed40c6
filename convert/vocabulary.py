"""A tokenizer in llama.cpp's terms, and what every kind of tokenizer file has in common: special tokens, flags, the chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from gearcpp.errors import DataError

from .config import read_json
from .metadata import Metadata

# Models add tokens such as <|im_start|> as ordinary text now and then; users' text must not be able to write them.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d*>|<pad>|<mask>")
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "mask")
# As GGUF spells them.
_ID_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
_PADDING_SCORE = -1e4


@dataclass
class Vocabulary:
    """What ``tokenizer.*`` of a GGUF file says."""

    model: str  # "gpt2": byte-level BPE by merges; "llama": SentencePiece's BPE by scores; "gemma4": by merges
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special_ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token, add_eos_token, add_space_prefix
    chat_template: str | None = None
    notices: list[str] = field(default_factory=list)

    def add(self, index: int, text: str, special: bool) -> None:
        """Put an added token in its place, filling the ids before it.

        Raises:
            DataError: an id that cannot be.
        """
        if not 0 <= index < len(self.tokens) + 1_000_000:
            raise DataError(f"the tokenizer gives the added token {text!r} the id {index}")
        self.pad(max(index + 1, len(self.tokens)))
        special = special or _LOOKS_SPECIAL.fullmatch(text) is not None
        self.tokens[index] = text if special else text.replace("▁", " ")  # llama.cpp finds these before it writes spaces as ▁
        self.types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED

    def pad(self, n_tokens: int) -> None:
        """Fill up to `n_tokens`: llama.cpp wants as many tokens as the embedding has rows.

        Raises:
            DataError: there are more tokens than that.
        """
        if len(self.tokens) > n_tokens:
            raise DataError(
                f"the tokenizer has {len(self.tokens)} tokens, but config.json says vocab_size = {n_tokens}: tokens were added without a row in the "
                f"embedding. Take those from {n_tokens} on out of added_tokens.json and tokenizer.json, or resize the model's embedding "
                "(resize_token_embeddings in transformers) and save it again"
            )
        missing = range(len(self.tokens), n_tokens)
        self.tokens += [f"[PAD{index}]" for index in missing]
        self.types += [TokenType.UNUSED for _ in missing]
        if self.scores:
            self.scores += [_PADDING_SCORE for _ in missing]

    def metadata(self) -> Metadata:
        """GGUF's keys, complete."""
        self._check_unique()
        values: Metadata = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in self.types],
        }
        if self.scores:
            values["tokenizer.ggml.scores"] = self.scores
        if self.merges:
            values["tokenizer.ggml.merges"] = self.merges
        values |= {f"tokenizer.ggml.{_ID_KEYS[name]}_token_id": index for name, index in self.special_ids.items()}
        values |= {f"tokenizer.ggml.{name}": value for name, value in self.flags.items()}
        if self.chat_template:
            values["tokenizer.chat_template"] = self.chat_template
        return values

    def _check_unique(self) -> None:
        seen: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            if not token or token in seen:
                raise DataError(
                    f"tokens {seen.get(token)} and {index} are both {token!r}, which llama.cpp cannot load" if token else f"token {index} is empty"
                )
            seen[token] = index


def set_special_ids(vocabulary: Vocabulary, folder: Path, config_json: Mapping[str, Any]) -> None:
    """Ids of the special tokens: by their text in tokenizer_config.json, else as config.json or generation_config.json has them."""
    settings, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    for name in _SPECIAL_TOKENS:
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        candidates = [ids.get(text or ""), *(next(iter(_ids(config, f"{name}_token_id")), None) for config in (config_json, generation))]
        if (chosen := next((index for index in candidates if index is not None), None)) is not None:
            vocabulary.special_ids.setdefault(name, chosen)
    ends = [index for config in (config_json, generation) for index in _ids(config, "eos_token_id")]
    turn_end = next((index for index in ends if index < len(vocabulary.tokens) and vocabulary.tokens[index] in _TURN_ENDS), None)
    if turn_end is not None:
        vocabulary.special_ids["eot"] = turn_end
    for name, index in vocabulary.special_ids.items():
        if index >= len(vocabulary.tokens):
            raise DataError(f"the {name} token has the id {index}, but there are {len(vocabulary.tokens)} tokens")


def _ids(config: Mapping[str, Any], name: str) -> list[int]:
    """A token id of a config, where models with several ends of text have a list."""
    value = config.get(name)
    return [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int) and index >= 0]


def chat_template(folder: Path) -> str | None:
    """The (default) chat template: of tokenizer_config.json, or in a file of its own."""
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if template is None and (path := folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    return template
