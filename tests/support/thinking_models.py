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
_ENDS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
    if "<|return|>" in special:
        tokenizer.eos_token = "<|return|>"
    return tokenizer


def prompts(folder: Path) -> list[str | Path]:
    """Options with harmful prompts that start with p and harmless ones that start with q."""
    options: list[str | Path] = []
    for kind, letter in (("harmful", "p"), ("harmless", "q")):
        path = folder / f"{kind}.txt"
        path.write_text(
            "".join(f"{letter}{end}\n" for end in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        )
        options += [f"--{kind}", path]
    return options


def scripted(
    folder: Path,
    tokenizer: Any,
    thought: str,
    answer: str,
    other: str = "",
    before: str = "",
    **render: Any,
) -> Path:
    """A model on disk that says a thought and an answer, then ends its turn.

    Whether the prompt holds a ``p`` or a ``q`` is averaged into every token's stream by the first
    block, along one axis, and decides between the first tokens of two answers: one refuses.

    Args:
        folder: where it goes.
        tokenizer: its tokenizer.
        thought: what it says first after any prompt of as many tokens as ``p0``.
        answer: what it says then.
        other: instead of the first token of ``answer``, where the prompt holds a ``q``.
        before: what stands between the template's prompt and the thought.
        render: variables of the template.
    """
    tokenizer.save_pretrained(folder)

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "p0"}], add_generation_prompt=True, tokenize=False, **render
    )
    # As one text, so that tokens come as they do in a prompt that holds it.
    start, first = len(ids_of(text + before)), len(ids_of(text + before + thought))
    ids = [*ids_of(text + before + thought + answer)[start:], tokenizer.eos_token_id]
    size = 200
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size - 2, n_embd=size, n_layer=4, n_head=1,
        n_inner=1,  # an MLP of zeros needs no width
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        body, head = model.transformer, model.lm_head.weight
        body.ln_f.weight.fill_(1.0)
        body.wpe.weight[:, : size - 2] = torch.eye(size - 2)
        for step, token in enumerate(ids):
            head[token, start - 1 + step] = 1.0
        if other:
            (instead,) = ids_of(other)
            head[instead, first - 1] = 1.0
            head[ids[first - start], size - 1], head[instead, size - 1] = 0.6, -0.6
            body.wte.weight[ids_of("p")[0], size - 1] = 1.0
            body.wte.weight[ids_of("q")[0], size - 1] = -1.0
            block = body.h[0]
            block.ln_1.weight.fill_(1.0)
            block.attn.c_attn.weight[size - 1, 3 * size - 1] = 1.0  # the value; q and k stay zero
            block.attn.c_proj.weight[size - 1, size - 1] = 1.0
    model.save_pretrained(folder)
    return folder
