"""Tiny BERT classifiers with hand-set weights, whose verdicts are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = ("no", "bomb", "yes", "bread", "sep", "[", "]", "fill", ".")
LENGTH = 24


def word_classifier(
    folder: Path,
    words: Mapping[str, str],
    labels: Sequence[str],
    pairs: bool = True,
    **config: Any,
) -> Path:
    """A BERT that gives a text the label of the one word of ``words`` in it, else the first label.

    Attention sees all tokens alike and adds up their embeddings, which only those words have.

    Args:
        folder: where it goes.
        words: label by word.
        labels: all labels; the first is the usual one.
        pairs: its tokenizer sets something between two texts.
        config: further fields of the configuration.
    """
    vocabulary = {word: n for n, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if pairs:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=LENGTH,
    ).save_pretrained(folder)  # fmt: skip
    width = 16
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=width,
            max_position_embeddings=LENGTH,
            id2label=dict(enumerate(labels)),
            label2id={one: n for n, one in enumerate(labels)},
            **config,
        )
    )
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.bert.embeddings.LayerNorm, layer.attention.output.LayerNorm):
            norm.weight.fill_(1.0)
        layer.output.LayerNorm.weight.fill_(1.0)
        for linear in (layer.attention.self.value, layer.attention.output.dense):
            linear.weight.copy_(torch.eye(width))
        model.bert.pooler.dense.weight.copy_(torch.eye(width))
        for axis, (word, label) in enumerate(words.items()):
            model.bert.embeddings.word_embeddings.weight[vocabulary[word], axis] = 1.0
            model.classifier.weight[list(labels).index(label), axis] = 10.0
        model.classifier.bias[:] = -5.0
        if len(labels) > 1:
            model.classifier.bias[0] = 0.0
    model.save_pretrained(folder)
    return folder
