"""Chat templates of models that think first, and models that say a script, whatever they are asked.

A scripted model is a GPT-2 of zero weights but one-hot position embeddings, which the head maps to
the script's tokens: at position ``n - 1 + i`` of a prompt of ``n`` tokens it says the ``i``-th.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

_TURNS = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and '</think>' in message['content'] %}"
    "{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
)
_PLAIN = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
)
# DeepSeek-R1 and its distills: the prompt ends within the thought.
R1 = _TURNS + "<think>\n{% endif %}"
# Qwen3: the model opens the thought, a switch writes an empty one.
QWEN = (
    _TURNS + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The first DeepSeek-R1, QwQ: the model opens the thought, and there is no switch.
SELF_OPENED = _TURNS + "{% endif %}"
# DeepSeek-V3.1: thinks only if it is told to, and closes a thought that was never opened.
OFF_BY_DEFAULT = (
    _PLAIN + "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
    "{% endif %}"
)
# Granite 3: a switch that changes the system message alone.
SYSTEM_SWITCH = (
    "{% if thinking %}<|start|>system\nThink first.<|end|>\n{% endif %}" + _PLAIN + "{% endif %}"
)
# Mistral: a word for the effort.
EFFORT = (
    "{% set reasoning_effort = reasoning_effort or 'high' %}"
    "{% if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('none or high') }}"
    "{% endif %}<|start|>settings\n{{ reasoning_effort }}<|end|>\n" + _PLAIN + "{% endif %}"
)
# Qwen3-Thinking, MiniMax: past thoughts show the family's form.
SHOWS_ITS_FORM = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>\n{{ message['reasoning_content'] }}\n~</think>~~"
    "{% endif %}{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>{% endif %}"
)
# gpt-oss, simplified.
HARMONY = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ message['content'] }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|return|>", "<|call|>")


def tagged(opening: str, closing: str) -> str:
    """A template whose prompt ends within a thought of these tags, which a switch closes not."""
    return (
        _PLAIN.replace("message['content'] }}", f"message['content'].split('{closing}')[-1] }}}}")
        + f"{opening}{{% endif %}}"
    )


def tokenizer_with(tokenizer_dir: Path, template: str, special: tuple[str, ...] = ()) -> Any:
    """The suite's tokenizer with another chat template and further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def scripted(
    folder: Path, tokenizer: Any, script: str, prompt: str = "p0", before: str = "", **render: Any
) -> Path:
    """A model on disk that says ``script``, then ends its turn.

    Args:
        folder: where it goes.
        tokenizer: its tokenizer.
        script: what it says after any prompt of as many tokens as that of ``prompt``.
        prompt: the user's text.
        before: what stands between the template's prompt and the script.
        render: variables of the template.
    """
    tokenizer.save_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False, **render
    )
    start = len(tokenizer(text + before, add_special_tokens=False)["input_ids"])
    ids = [*tokenizer(script, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    size = 192
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size, n_embd=size, n_layer=2, n_head=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(torch.eye(size))
        for step, token in enumerate(ids):
            model.lm_head.weight[token, start - 1 + step] = 1.0
    model.save_pretrained(folder)
    return folder
