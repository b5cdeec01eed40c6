"""Small models of every architecture with random weights, and tokenizers trained on the text below, saved as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

N_TOKENS = 640

# Written for this test. Enough of each kind of text for merges to be learned across its boundaries.
TRAINING_TEXT = (
    """
The lamp on the pier had been out since Tuesday, and nobody in the harbour office could say who was meant to light it. They'd written to the county
twice; the county's answer, when it came, was that lamps weren't its business. "It isn't mine," said the harbourmaster, "and I'll not climb up there."
So the boats came in by the moon, 3 of them, then 14, then 159 in a single week, and the fish were sold for 26 pence, for 53, for 5897 in the end.
We're told that 2024 was dry, that 1999 had been wet, that the average of 10 years (1990-2000) is 1.5 metres, i.e. 150 cm or 59.06 inches.

def widest(lines: list[str]) -> int:
    longest = 0
    for line in lines:
        if len(line) > longest:
            longest = len(line)
    return longest  # 0 for no lines

int main(void) {
\tfor (int i = 0; i < 1000; ++i) {
\t\tprintf("%d\\n", values[i] * 2 + 1);
\t}
\treturn 0;
}

Der Zug nach Köln fährt um 17:45 Uhr; für Größe und Maß gilt: 20 % mehr. Le garçon a mangé où l'élève dîne, à côté du théâtre. ¿Dónde está el niño?
Поезд уходит в полночь, и никто не знает, куда. Старый дом стоял у реки. Ο άνεμος φυσάει από τη θάλασσα. השמש זורחת. الشمس تشرق كل يوم.
今天天气很好,我们去公园散步。他买了三本书和两支笔。東京の空は青い。明日は雨が降るでしょう。그는 바다를 보고 있었다. हम कल बाज़ार जाएंगे।
🙂🙂 👍🏽 🚀🚀🚀 ❤️ 👩‍🚀 — “quoted” … ½ × ² ≤ ≥ → ∑ √
"""
    * 3
)

# What is compared with the tokenizer of transformers. No space beside a special token: where those go is for the tokenizers' own flags.
NASTY_TEXT = (
    "Hello  world!\n\n\n  def f(x):\n\t\treturn x**2 + 1234567890 * 3.14159\n\n"
    "I'll we'VE THEY'D can't   trailing   \t \n \r\n x\u00a0y\u3000z 1 12 123 1234 12345 ½²٣ IVⅧ "
    "Größe naïve Ångström ÀÉÎ ελληνικά Привет שלום السلام 今天天气很好。東京タワー 한국어 हिन्दी ไทย "
    "🙂👍🏽👩‍🚀🏴‍☠️ <|notspecial|> a<b>c</b> https://example.com/?q=1&r=%20 snake_case camelCaseWord HTTPServer "
    "----==== ....... !!!??? ''' \"\"\" \\n \\\\ {}[]() €100 $5.00 #tag @user \u200b\ufeff end"
)


@dataclass(frozen=True)
class Sample:
    """A model of one architecture: its config class, what differs from the common sizes, its kind of tokenizer."""

    config: str
    tokenizer: Callable[[Path], None]
    changes: dict[str, Any] = field(default_factory=dict)


# ---- tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_WORDS = QWEN2_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+X|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*X"
_AFTER_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O_WORDS = _CASED.replace("X", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _AFTER_CASED
DEEPSEEK3_WORDS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    """[!"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"""
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
TEKKEN_WORDS = _CASED.replace("X", "") + r"|\p{N}" + _AFTER_CASED


def byte_level(
    *words: str, whole_words_first: bool = False, bos: bool = False, digits: bool = False, nfc: bool = False, added: tuple[str, ...] = ()
) -> Callable[[Path], None]:
    """A byte-level BPE that splits by regular expressions (none: GPT-2's built-in one), like the published tokenizers of most families."""

    def save(folder: Path) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words_first))
        steps: list[Any] = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in words]
        steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)]
        tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        special = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=N_TOKENS - 8, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
        tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in added])
        tokenizer.post_processor = (
            processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)])
            if bos
            else processors.ByteLevel(trim_offsets=False)
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        _save_settings(folder, bos_token="<|begin|>", eos_token="<|endoftext|>", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")

    return save


def sentencepiece(prefix: bool = True, keep_model: bool = False, keep_json: bool = True) -> Callable[[Path], None]:
    """A SentencePiece BPE with byte fallback: Llama 2's tokenizer if `prefix`, else Gemma's."""

    def save(folder: Path) -> None:
        import sentencepiece as spm

        corpus = folder / "corpus.txt"
        corpus.write_text(TRAINING_TEXT, encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=N_TOKENS - 8,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["<start_of_turn>"],
            max_sentence_length=100_000,
            minloglevel=2,
        )
        corpus.unlink()
        (folder / "tokenizer.vocab").unlink()
        if keep_json:
            _sentencepiece_as_json(folder, prefix)
        if not keep_model:
            (folder / "tokenizer.model").unlink()
        _save_settings(folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)

    return save


def _sentencepiece_as_json(folder: Path, prefix: bool) -> None:
    """As transformers converts it: every way of joining two pieces is a merge, ordered by the score of what it makes."""
    import sentencepiece as spm
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    joined = []
    for piece, index in vocab.items():
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        joined += [(-pieces.get_score(index), vocab[left], vocab[right], left, right) for left, right in cuts if left in vocab and right in vocab]
    merges = [(left, right) for *_, left, right in sorted(joined)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<start_of_turn>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _save_settings(folder: Path, **settings: Any) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# ---- models

_SIZES = {
    "vocab_size": N_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.25 * pair for pair in range(8)],
    "short_factor": [1.0 + 0.05 * pair for pair in range(8)],
    "original_max_position_embeddings": 256,  # llama.cpp rounds a context up to 256 and goes by that
}
_MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "sliding_window": 8, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": N_TOKENS,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2}
_DELTA_NET = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,  # equal to that of values, as in every published model: llama.cpp has one size for both
    "linear_value_head_dim": 32,
}
_GLM_MARKS = ("[gMASK]", "<|user|>", "<|observation|>")
_ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_YARN_ALL = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
_GRANITE4 = {
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
_NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0}
_FALCON_H1 = {
    "head_dim": 16,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.3,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.7,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.6,
    "mlp_multipliers": [0.8, 0.3],
    "ssm_multipliers": [0.35, 0.25, 0.4, 0.5, 0.36],
}
_NEMOTRON_H = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
}
_SHARED_EXPERT = {"num_experts": 4, **_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}

SAMPLES: dict[str, Sample] = {
    "llama-2": Sample("LlamaConfig", sentencepiece(), {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 4}),
    "llama-3": Sample(
        "LlamaConfig", byte_level(LLAMA3_WORDS, whole_words_first=True, bos=True), {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}
    ),
    "llama-biased": Sample("LlamaConfig", byte_level(), {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "smollm": Sample("LlamaConfig", byte_level(digits=True), {"tie_word_embeddings": True}),
    "mistral": Sample("MistralConfig", sentencepiece(keep_model=True), {"sliding_window": None, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral-nemo": Sample("MistralConfig", byte_level(TEKKEN_WORDS, whole_words_first=True, bos=True), {"sliding_window": None}),
    "mixtral": Sample("MixtralConfig", sentencepiece(), {"num_local_experts": 4, **_EXPERTS, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen-2.5": Sample("Qwen2Config", byte_level(QWEN2_WORDS, nfc=True), {"rope_parameters": _YARN}),
    "qwen-3": Sample("Qwen3Config", byte_level(QWEN2_WORDS, nfc=True), {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen-3-moe": Sample(
        "Qwen3MoeConfig",
        byte_level(QWEN2_WORDS),
        {"head_dim": 16, "num_experts": 4, **_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen-3-next": Sample("Qwen3NextConfig", byte_level(QWEN2_WORDS), {**_DELTA_NET, **_SHARED_EXPERT}),
    "qwen-3.5": Sample("Qwen3_5TextConfig", byte_level(QWEN35_WORDS, nfc=True), {**_DELTA_NET, "tie_word_embeddings": True}),
    "qwen-3.5-moe": Sample("Qwen3_5MoeTextConfig", byte_level(QWEN35_WORDS, nfc=True), {**_DELTA_NET, **_SHARED_EXPERT}),
    "gemma-2": Sample("Gemma2Config", sentencepiece(prefix=False), _GEMMA),
    "gemma-3": Sample("Gemma3TextConfig", sentencepiece(prefix=False), {**_GEMMA, "num_hidden_layers": 7}),
    "gemma-4": Sample(
        "Gemma4TextConfig",
        sentencepiece(prefix=False),
        {**_GEMMA4, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    ),
    "gemma-4-moe": Sample(
        "Gemma4TextConfig",
        sentencepiece(prefix=False),
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi-3": Sample("Phi3Config", sentencepiece(), {"num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "phi-3-long": Sample(
        "Phi3Config",
        byte_level(GPT4O_WORDS),
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "smollm-3": Sample("SmolLM3Config", byte_level(LLAMA3_WORDS, whole_words_first=True), {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "mistral-3": Sample("Ministral3Config", byte_level(TEKKEN_WORDS, whole_words_first=True, bos=True), {"head_dim": 16, "rope_parameters": _MINISTRAL}),
    "glm-4": Sample(
        "Glm4Config", byte_level(LLAMA3_WORDS, whole_words_first=True, added=("<|user|>",)), {"head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": True}
    ),
    "glm-4.5": Sample(
        "Glm4MoeConfig",
        byte_level(LLAMA3_WORDS, whole_words_first=True, added=_GLM_MARKS),
        {"head_dim": 16, "use_qk_norm": True, "attention_bias": True, **_ROUTED},
    ),
    "glm-4.7-flash": Sample(
        "Glm4MoeLiteConfig", byte_level(LLAMA3_WORDS, whole_words_first=True, added=_GLM_MARKS), {**_LATENT, **_ROUTED, "scoring_func": "sigmoid"}
    ),
    "ernie-4.5": Sample("Ernie4_5Config", sentencepiece(), {"head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}),
    "lfm-2": Sample(
        "Lfm2Config",
        byte_level(LLAMA3_WORDS, whole_words_first=True),
        {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 32, "tie_word_embeddings": True},
    ),
    "minimax-m2": Sample(
        "MiniMaxM2Config",
        byte_level(GPT4O_WORDS),
        {"intermediate_size": 32, "head_dim": 32, "rotary_dim": 16, "num_local_experts": 4, **_EXPERTS, "scoring_func": "sigmoid"},
    ),
    "gpt-oss": Sample(
        "GptOssConfig",
        byte_level(GPT4O_WORDS),
        {"head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, **_EXPERTS, "sliding_window": 8, "rope_parameters": _YARN},
    ),
    "deepseek-v3": Sample(
        "DeepseekV3Config", byte_level(*DEEPSEEK3_WORDS), {**_LATENT, **_ROUTED, "scoring_func": "sigmoid", "rope_parameters": _YARN_ALL}
    ),
    "granite-4": Sample("GraniteMoeHybridConfig", byte_level(LLAMA3_WORDS), {**_GRANITE4, "num_local_experts": 4, **_EXPERTS}),
    "granite-4-dense": Sample("GraniteMoeHybridConfig", byte_level(LLAMA3_WORDS), {**_GRANITE4, **_NO_EXPERTS, "mamba_n_groups": 1}),
    "granite-4-attention": Sample(
        "GraniteMoeHybridConfig",
        byte_level(LLAMA3_WORDS),
        {**_GRANITE4, **_NO_EXPERTS, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
    ),
    "falcon-h1": Sample("FalconH1Config", byte_level(LLAMA3_WORDS), {**_FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "falcon-h1-without-norm": Sample("FalconH1Config", byte_level(LLAMA3_WORDS), _FALCON_H1),
    "nemotron-h": Sample(
        "NemotronHConfig",
        byte_level(TEKKEN_WORDS, whole_words_first=True, bos=True),
        {**_NEMOTRON_H, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]},
    ),
    "nemotron-3": Sample(
        "NemotronHConfig",
        byte_level(TEKKEN_WORDS, whole_words_first=True, bos=True),
        {
            **_NEMOTRON_H,
            **_ROUTED,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "olmo-3": Sample("Olmo3Config", byte_level(LLAMA3_WORDS), {"sliding_window": 8, "num_hidden_layers": 5}),
    "olmo-2": Sample("Olmo2Config", byte_level(LLAMA3_WORDS)),
    "granite": Sample(
        "GraniteConfig",
        byte_level(digits=True),
        {"attention_multiplier": 0.3, "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 4.0, "tie_word_embeddings": True},
    ),
    "gpt-2": Sample("GPT2Config", byte_level(), {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256, "tie_word_embeddings": True}),
}


def save_sample(name: str, folder: Path, dtype: str = "float32", shard_size: str = "50GB") -> Any:
    """Save a sample's model and tokenizer; returns the model as transformers loads it from there, in f32."""
    import torch
    import transformers

    sample = SAMPLES[name]
    sizes = {"vocab_size": N_TOKENS, "bos_token_id": 0, "eos_token_id": 1} if sample.config == "GPT2Config" else _SIZES
    config = getattr(transformers, sample.config)(**{**sizes, **sample.changes})
    torch.manual_seed(20240607)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in parameter_name or "ln_" in parameter_name:
                parameter += 0.2 * noise
            else:
                parameter.copy_(0.15 * noise)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):  # a weight of the router that no gradient trains
                buffer.copy_(0.15 * torch.randn_like(buffer))
            if buffer_name.endswith("layer_scalar"):
                buffer += 0.2 * torch.randn_like(buffer)
    model = model.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_size)
    sample.tokenizer(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def save_mxfp4(folder: Path, packed: Path, plain: Path, seed: int) -> None:
    """The gpt-oss of `folder` with random experts: as blocks and scales of MXFP4 in `packed`, the same numbers as float32 in `plain`."""
    from safetensors.numpy import load_file, save_file

    random, numbers = np.random.default_rng(seed), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    stored = load_file(folder / "model.safetensors")
    as_packed = {name: tensor for name, tensor in stored.items() if not name.endswith("_proj")}
    as_plain = dict(as_packed)
    for name in stored.keys() - as_packed.keys():
        n_experts, n_in, n_out = stored[name].shape
        codes = random.integers(0, 16, (n_experts, n_out, n_in // 32, 32)).astype(np.uint8)
        scales = random.integers(120, 127, codes.shape[:3]).astype(np.uint8)
        as_packed |= {f"{name}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{name}_scales": scales}
        values = np.ldexp(numbers[codes], scales[..., None].astype(np.int32) - 127)
        as_plain[name] = np.ascontiguousarray(values.reshape(n_experts, n_out, n_in).swapaxes(1, 2))
    for target, tensors in ((packed, as_packed), (plain, as_plain)):
        target.mkdir()
        for file in folder.glob("*.json"):
            (target / file.name).write_bytes(file.read_bytes())
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))


def write_llama(folder: Path, tokenizer: Callable[[Path], None] | None = None, d_model: int = 64, **config_changes: Any) -> dict[str, Any]:
    """A Llama of one layer without the help of transformers; returns its tensors."""
    from safetensors.numpy import save_file

    d_ff, d_kv = config_changes.get("intermediate_size", 2 * d_model), d_model // 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": N_TOKENS,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **config_changes,
    }
    layer = {
        "input_layernorm": (d_model,),
        "self_attn.q_proj": (d_model, d_model),
        "self_attn.k_proj": (d_kv, d_model),
        "self_attn.v_proj": (d_kv, d_model),
        "self_attn.o_proj": (d_model, d_model),
        "post_attention_layernorm": (d_model,),
        "mlp.gate_proj": (d_ff, d_model),
        "mlp.up_proj": (d_ff, d_model),
        "mlp.down_proj": (d_model, d_ff),
    }
    shapes = {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (N_TOKENS, d_model), "model.norm": (d_model,), "lm_head": (N_TOKENS, d_model)}
    random = np.random.default_rng(7)
    tensors = {f"{name}.weight": (0.2 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    (tokenizer or byte_level())(folder)
    return tensors
