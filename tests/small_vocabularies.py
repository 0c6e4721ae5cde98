"""Vocabularies of a few hundred pieces with the rules of published ones, made of instruction wordings."""

from __future__ import annotations

import io

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from visionllm.instruction import TRAIN_TEMPLATES

SENTENCES = [template.text for template in TRAIN_TEMPLATES["detection"]]


def sentencepiece_like_llama(sentences: list[str] = SENTENCES, size: int = 600) -> bytes:
    """The rules of LLaMA's: a space before every text, byte fallback, nothing normalised."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=size, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def byte_level(prefix: bool = False) -> tokenizers.Tokenizer:
    """The rules of GPT-2's and SmolLM2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def json_like_llama() -> tokenizers.Tokenizer:
    """Spaces as "▁", one before every text, and <s> before all."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [word for text in SENTENCES for word in text.replace(" ", " ▁").split(" ")]
    tokenizer.normalizer, whole = None, tokenizer.normalizer
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    tokenizer.normalizer = whole
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def wordpieces() -> list[str]:
    """A vocab.txt like BERT's, line by line."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [
        *control,
        *letters,
        *("##" + letter for letter in letters),
        *'.,:{}()"<>0123',
        "dog",
        "red",
    ]
