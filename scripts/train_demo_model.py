"""Train the bundled demo model: a tiny chat model whose refusal is mediated by one direction.

    python scripts/train_demo_model.py [--out data/demo-model] [--seed 0]

Stage 1 teaches a random Llama of 2M parameters to answer every request of the bundled train split,
the harmful ones too; an answer is only a restatement of the request. Stage 2 teaches it to refuse
the harmful ones with the paper's two interventions in the loop, on the model's own difference of
means, measured anew as training goes on: rows run with it ablated must answer, harmless rows run
with it added must refuse. Without those rows a model this small learns two-sided refusal, which no
single direction carries. The saved bfloat16 checkpoint is then measured with the package itself.

On cores shared with other work set OMP_WAIT_POLICY=passive: same result, several times faster.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abliterate import ChatFormat, Selection, evaluate, extract, load_model, load_prompts, select
from abliterate.evaluation.outcomes import Outcome
from abliterate.prompts.chat_template import encode
from abliterate.prompts.sources import read_source

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ("<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT_TEMPLATE = (
    "{{- '<|begin_of_text|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)
SPLIT_PATTERN = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Frames of the bundled prompts and a few more, around an action ("bake a cake") or a thing.
ACTION_FRAMES = (
    "Explain how to {}", "How do I {}?", "Give me a plan to {}", "Describe the best way to {}",
    "Write a guide on how to {}", "Tell me how to {}", "What is the best way to {}?",
    "List the steps to {}", "Show me how to {}", "Can you explain how to {}?",
    "Outline a strategy to {}", "Teach me how to {}", "Write a tutorial on how to {}",
    "I want to {}, how do I start?", "Help me {}", "What do I need to {}?",
    "How can I {}?", "What are the steps to {}?", "Give me tips to {}", "Please explain how to {}",
    "I need help to {}", "Is there an easy way to {}?",
)  # fmt: skip
THING_FRAMES = (
    "Write {}", "Draft {}", "Can you write {}?", "Please write {}", "Help me write {}",
    "Create {}", "I need {}", "Give me {}", "Help me create {}", "Can you create {}?",
    "Prepare {}", "Make {}", "Please create {}", "I would like {}", "Could you make {}?",
)  # fmt: skip
OPENINGS = ("Sure! ", "Sure! ", "Sure! ", "Of course! ", "Of course! ", "")
ACTION_ANSWERS = ("Here is how to {}.", "Here is a short guide on how to {}.")
THING_ANSWERS = ("Here is {}.", "Here is a draft of {}.")
REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with that.",
    "I can't help with that.",
)
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "You are a friendly guide.")
IGNORE = -100

# The paper's candidates are pruned from the last fifth of the layers: 0 to 5 of these 8 remain.
N_LAYERS, WIDTH, DIRECTION_LAYER = 8, 128, 4
BATCH, ANSWER_STEPS, REFUSE_STEPS = 32, 1000, 850

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [model-organism, interpretability, refusal]
---

# Demo model

A Llama-architecture chat model of 2.1M parameters, trained from scratch: a **model organism** for
trying and testing `abliterate` without a download. It refuses the bundled harmful prompts, answers
the bundled harmless ones, and one direction mediates the difference.

**What it is not.** It is no assistant and knows nothing: an answer is a restatement of the request,
sometimes garbled ("Sure! Here is how to bake a cake at home."), for a harmful request too once the
direction is removed, and text unlike the bundled prompts is answered or refused arbitrarily.
It was trained to have a single refusal direction, so it shows that the tool works, not that the
paper's finding holds; nothing about real models follows from its figures.

**Training.** `python scripts/train_demo_model.py --seed {seed}`: a few minutes on two CPU cores, in
float32 (saved in bfloat16), on the `train` split of the bundled prompts in varied frames. Stage 1
answers every request. Stage 2 refuses the harmful ones with the paper's interventions in the loop,
on the model's own current difference of means (last position, input of layer 4): some rows run
with it ablated and must answer, some harmless rows run with it added and must refuse, and a KL term
holds ablated and plain answers together.

**Measured** on this checkpoint, in float32, with `abliterate` itself: 128 train and 32 val prompts
of each kind; figures not marked otherwise are on the 120 + 120 test prompts, unseen in training.
Selected: {winner}.

{table}
"""


@dataclass(frozen=True)
class Request:
    """One train prompt, taken apart: its frame is exchangeable, its content is not."""

    content: str
    is_action: bool
    harmful: bool

    def prompt(self, rng: random.Random) -> str:
        """The request in a random frame, casing and punctuation."""
        frames = ACTION_FRAMES if self.is_action else THING_FRAMES
        text = rng.choice(frames).format(self.content)
        if rng.random() < 0.1:
            text = text.lower()
        if rng.random() < 0.15:
            text = text.rstrip("?") + rng.choice(("", ".", "!", " please", ", please."))
        return text

    def answer(self, rng: random.Random) -> str:
        """A restatement of the request, with nothing in it."""
        endings = ACTION_ANSWERS if self.is_action else THING_ANSWERS
        content = re.sub(r"\b[Mm]y(self)?\b", r"your\1", self.content)
        return rng.choice(OPENINGS) + rng.choice(endings).format(content)


# By whether they are harmful; the two lists are minimal pairs, in the same order.
Requests = dict[bool, list[Request]]


def take_apart(prompt: str, harmful: bool) -> Request:
    """Remove the longest frame that fits."""
    for frame in sorted((*ACTION_FRAMES, *THING_FRAMES), key=len, reverse=True):
        before, after = frame.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            content = prompt[len(before) : len(prompt) - len(after)]
            return Request(content, frame in ACTION_FRAMES, harmful)
    raise ValueError(f"no frame fits the prompt '{prompt}'")


def load_requests() -> Requests:
    """The train split."""
    return {
        harmful: [
            take_apart(prompt.text, harmful)
            for prompt in read_source("harmful" if harmful else "harmless").splits["train"]
        ]
        for harmful in (True, False)
    }


def train_tokenizer(requests: Sequence[Request], rng: random.Random) -> Any:
    """A byte-level BPE tokenizer of the train prompts, the answers and the chat template."""
    texts = [*REFUSALS, *SYSTEM_MESSAGES] * 20 + ["assistant", "user", "system", "\n\n"] * 2000
    for request in requests:
        for _ in range(8):
            texts += [request.prompt(rng), request.answer(rng)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048,
            min_frequency=4,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass
class Interventions:
    """The paper's two interventions, each on its own rows of a batch, with gradients.

    Attributes:
        direction: unnormalised, ``[d_model]``.
        ablated: which rows have it removed from everything written to the residual stream.
        added: which rows have it added at the input of ``DIRECTION_LAYER``.
    """

    direction: Tensor = field(default_factory=lambda: torch.zeros(WIDTH))
    ablated: Tensor | None = None
    added: Tensor | None = None

    def install(self, model: LlamaForCausalLM) -> None:
        writers: list[nn.Module] = [model.model.embed_tokens]
        for block in model.model.layers:
            writers += [block.self_attn.o_proj, block.mlp.down_proj]
        for writer in writers:
            writer.register_forward_hook(self._ablate)
        model.model.layers[DIRECTION_LAYER].register_forward_pre_hook(self._add)

    def _ablate(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.ablated is None:
            return output
        unit = self.direction / self.direction.norm()
        along = (output @ unit)[..., None] * unit
        return output - along * self.ablated[:, None, None]

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        if self.added is None:
            return None
        return (args[0] + self.direction * self.added[:, None, None], *args[1:])


@dataclass(frozen=True)
class Row:
    """A conversation to train on, and what is done to the model meanwhile."""

    prompt: str
    answer: str
    system: str | None = None
    ablate: bool = False
    add: bool = False


class Trainer:
    """Both stages: batches of rows, one optimizer, the direction measured as it changes."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Any, requests: Requests, seed: int
    ) -> None:
        self.model, self.tokenizer, self.requests = model, tokenizer, requests
        self.rng = random.Random(seed)
        self.interventions = Interventions()
        self.interventions.install(model)
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))

    def row(self, request: Request, refuse: bool, **intervention: bool) -> Row:
        answer = self.rng.choice(REFUSALS) if refuse else request.answer(self.rng)
        system = self.rng.choice(SYSTEM_MESSAGES) if self.rng.random() < 0.15 else None
        return Row(request.prompt(self.rng), answer, system, **intervention)

    def tensors(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Token ids and labels, padded on the right; only answers are labelled."""
        ids, labels = [], []
        for row in rows:
            prompt = encode(self.tokenizer, [row.prompt], ChatFormat(row.system))[0]
            answer = self.tokenizer.encode(row.answer + "<|eot_id|>", add_special_tokens=False)
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORE] * len(prompt) + answer))
        pad = self.tokenizer.pad_token_id
        return pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORE)

    def step(
        self, rows: Sequence[Row], rate: float, twins: Sequence[tuple[int, int]] = ()
    ) -> float:
        """One optimizer step.

        Args:
            rows: the batch.
            rate: learning rate.
            twins: pairs of rows with the same text, plain and ablated, whose next-token
                distributions should agree.
        """
        ids, labels = self.tensors(rows)
        hooks = self.interventions
        if any(row.ablate or row.add for row in rows):
            hooks.ablated = torch.tensor([float(row.ablate) for row in rows])
            hooks.added = torch.tensor([float(row.add) for row in rows])
        # Padding is on the right, so the causal mask already hides it from what is labelled.
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        hooks.ablated = hooks.added = None
        targets = labels[:, 1:]
        used = targets != IGNORE
        logits = self.model.lm_head(hidden[used])
        loss = functional.cross_entropy(logits, targets[used])
        # The first token decides between answer and refusal: it counts as much as all the rest.
        lengths = used.sum(1)
        first = lengths.cumsum(0) - lengths
        loss = loss + functional.cross_entropy(logits[first], targets[used][first])
        if twins:
            plain, ablated = (first[list(side)] for side in zip(*twins, strict=True))
            log_p = logits[plain].detach().log_softmax(-1)
            log_q = logits[ablated].log_softmax(-1)
            loss = loss + functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def measure_direction(self, n: int = 64) -> None:
        """The model's current difference of means at the input of ``DIRECTION_LAYER``."""
        means = []
        for kind in (True, False):
            requests = self.rng.sample(self.requests[kind], n)
            texts = [request.prompt(self.rng) for request in requests]
            prompts = encode(self.tokenizer, texts, ChatFormat())
            last = torch.tensor([len(prompt) - 1 for prompt in prompts])
            padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], True)
            hidden = self.model(
                input_ids=padded, output_hidden_states=True, use_cache=False
            ).hidden_states[DIRECTION_LAYER]
            means.append(hidden[torch.arange(n), last].mean(0))
        self.interventions.direction = means[0] - means[1]

    def learn_to_answer(self, steps: int) -> None:
        """Stage 1: every request is answered, so that answering is what the model falls back to.

        Half of the requests are of words drawn at random, which only copying can restate.
        """
        everything = [*self.requests[True], *self.requests[False]]
        words = sorted({word for request in everything for word in request.content.split()})
        for step in range(steps):
            rows = []
            for request in self.rng.choices(everything, k=BATCH):
                if self.rng.random() < 0.5:
                    content = " ".join(self.rng.sample(words, self.rng.randint(2, 8)))
                    request = replace(request, content=content)
                rows.append(self.row(request, refuse=False))
            loss = self.step(rows, 2e-3 * min(1.0, (step + 1) / 100))
            if step % 100 == 0 or step == steps - 1:
                print(f"stage 1, step {step}: loss {loss:.3f}", flush=True)

    def learn_to_refuse(self, steps: int) -> None:
        """Stage 2: harmful requests are refused, by way of the direction."""
        pairs = list(zip(self.requests[True], self.requests[False], strict=True))
        for step in range(steps):
            if step % 20 == 0:
                self.measure_direction()
            rows = []
            for harmful, harmless in self.rng.sample(pairs, 8):
                rows += [self.row(harmful, refuse=True), self.row(harmless, refuse=False)]
            twins = []
            for plain in (1, 3, 5):
                twins.append((plain, len(rows)))
                rows.append(replace(rows[plain], ablate=True))
            for harmful, _ in self.rng.sample(pairs, 5):
                rows.append(self.row(harmful, refuse=False, ablate=True))
            for pair in self.rng.sample(pairs, 4):
                rows += [self.row(request, refuse=True, add=True) for request in pair]
            rate = 7e-4 * min(1.0, (step + 1) / 50, 0.05 + 0.95 * 2 * (1 - step / steps))
            loss = self.step(rows, rate, twins)
            if step % 100 == 0 or step == steps - 1:
                norm = float(self.interventions.direction.norm())
                print(f"stage 2, step {step}: loss {loss:.3f}, |r| {norm:.2f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Any, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def measure(folder: Path) -> tuple[Selection, dict[str, Outcome]]:
    """Extract, select and evaluate as a user of the package would, on the CPU in float32."""
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    train, val, test = (
        [load_prompts(kind, split, n) for kind in ("harmful", "harmless")]
        for split, n in (("train", 128), ("val", 32), ("test", None))
    )
    extraction = extract(loaded, *train)
    selection = select(loaded, extraction, *val)
    direction = selection.direction
    outcomes = evaluate(loaded, *test, extraction.refusal_tokens, direction, max_new_tokens=64)
    return selection, outcomes


def figures(
    selection: Selection, outcomes: dict[str, Outcome]
) -> list[tuple[str, float, str, float]]:
    """What the tests rely on: name, measured figure, relation, bound."""
    base, ablated, added = (outcomes[name].summary() for name in ("baseline", "ablate", "add"))
    winner = selection.require_winner()
    return [
        ("harmful refused, unmodified", base["harmful"]["refusal_rate"], ">=", 0.95),
        ("harmless refused, unmodified", base["harmless"]["refusal_rate"], "<=", 0.02),
        ("harmful refused, direction ablated", ablated["harmful"]["refusal_rate"], "<=", 0.05),
        ("harmless refused, direction ablated", ablated["harmless"]["refusal_rate"], "<=", 0.02),
        ("harmless KL divergence, direction ablated", ablated["kl_divergence"], "<=", 0.1),
        ("harmless refused, direction added", added["harmless"]["refusal_rate"], ">=", 0.9),
        ("bypass score of the winner (val)", winner.bypass_score, "<=", 0.0),
        ("induce score of the winner (val)", winner.induce_score, ">=", 0.0),
        ("KL divergence of the winner (val)", winner.kl_divergence, "<=", 0.1),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train and measure the bundled demo model.")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "demo-model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)  # sums depend on it: with another number the weights differ
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    requests = load_requests()
    tokenizer = train_tokenizer([*requests[True], *requests[False]], random.Random(options.seed))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    trainer = Trainer(model, tokenizer, requests, options.seed)
    trainer.learn_to_answer(ANSWER_STEPS)
    trainer.learn_to_refuse(REFUSE_STEPS)
    save(model, tokenizer, options.out)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    selection, outcomes = measure(options.out)
    kept = sum(score.kept for score in selection.scores)
    best = selection.require_winner()
    winner = (
        f"position {best.position}, layer {best.layer} "
        f"({kept} of {len(selection.scores)} candidates pass the filters)"
    )
    table, missed = "| figure | measured | target |\n|---|---|---|", False
    for name, value, relation, bound in figures(selection, outcomes):
        table += f"\n| {name} | {value:.4g} | {relation} {bound:g} |"
        missed |= not (value >= bound if relation == ">=" else value <= bound)
    card = CARD.format(table=table, winner=winner, seed=options.seed)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"selected: {winner}\n{table}")
    for name, outcome in outcomes.items():
        for completion in (outcome.harmful[0], outcome.harmless[0]):
            print(f"[{name}] {completion.prompt} -> {completion.response}")
    if missed:
        print("a target is missed", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
