"""A model on disk whose first token is known: it depends on a marker in the prompt alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


def first_token_model(
    folder: Path, tokenizer_dir: Path, shares: Mapping[str, Mapping[int | str, float]]
) -> Path:
    """A GPT-2 that says each marker's tokens first, with these shares, from hand-set weights.

    Attention sees all tokens alike and copies the marker's embedding; the head maps it to logits.

    Args:
        folder: where it goes.
        tokenizer_dir: its tokenizer.
        shares: by a character that stands in the prompts of one kind alone, the share of each
            first token, by its text or id.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(folder)
    width = 32
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=2, n_head=1,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False, layer_norm_epsilon=1e-12,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        block = model.transformer.h[0]
        block.ln_1.weight.fill_(1.0)
        block.attn.c_attn.weight[:, 2 * width :] = torch.eye(width)
        block.attn.c_proj.weight.copy_(torch.eye(width))
        logits = torch.zeros(len(shares), len(tokenizer))
        for axis, (marker, tokens) in enumerate(shares.items()):
            (marked,) = tokenizer(marker)["input_ids"]
            model.transformer.wte.weight[marked, axis] = 1.0
            # All other tokens, whose logits are zero, share what is left.
            above = math.log((len(tokenizer) - len(tokens)) / (1 - sum(tokens.values())))
            for token, share in tokens.items():
                ids = [token] if isinstance(token, int) else tokenizer(token)["input_ids"]
                assert len(ids) == 1, token
                logits[axis, ids[0]] = math.log(share) + above
        # A one-hot vector behind the last norm, on the axes that are used.
        behind = math.sqrt(width) * (torch.eye(width) - 1 / width) / math.sqrt(1 - 1 / width)
        used = behind[: len(shares), : len(shares)]
        model.lm_head.weight[:, : len(shares)] = torch.linalg.solve(used, logits).T
    model.save_pretrained(folder)
    return folder
