"""`python -m train.tiny_base`: the recipe of `tiny`, the shipped base model, from nothing.

A million-parameter policy spends its first minutes learning to copy names; reinforcement learning has nothing to reward before it
can. So the base of `tiny` learns that once: the language of the synthetic world and its tags, on exercises that are **not**
episodes (no document is read over several steps, nothing has to be remembered or chosen). What it learns:

    copy     TEXT of random words, QUERY two of them       → store the sentence that holds them
    find     TEXT of facts, QUERY a subject and a relation → store the sentence that states it
    answer   MEMORY of facts, a question of one link       → answer it; "unknown" where no entry states it
    link     a question of several links                   → search for the first
    next     the same, QUERY and MEMORY                    → search for the next link, or answer

Names are those of the train split; the log counts exact replies on names of the dev split. The folder `--out` then holds a
Hugging Face model (Qwen3 architecture, a word a token), `metrics.jsonl` and `curve.png`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track

from agents.baselines.world_reader import Fact, Link, query
from agents.models.chat_tokenizer import ChatTokenizer
from atommem_env.dialects import get_dialect
from atommem_env.prompts import get_layout
from atommem_env.tasks.synthetic_world import (
    INSTRUMENT,
    INSTRUMENTS,
    RELATIONS,
    Relation,
    chains,
    name_pools,
    vocabulary,
)
from atommem_env.types import Entry, EpisodeSettings, Observation, Operation, OperationKind
from eval.run_folder import read_jsonl, to_jsonl, write_atomic

_SPECIAL = ("<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>")
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MARKERS = ("QUESTIONS", "TEXT", "NOTICE", "NOTES", "QUERY", "MEMORY", "ANSWER")
_NOTICES = """
    The memory is full entries the new entry was not stored No entry is called the update delete was ignored Only the last
    read answer of a turn counts No question has been asked yet A question was asked turn had neither an answer nor a search
    was not closed by nothing was done for it needs id text nothing was updated times And more faults create empty
"""
_KINDS = ("copy", "find", "answer", "link", "next")
_RELATIONS = {relation.name: relation for relation in RELATIONS}
_LARGEST_ID = 64
_IGNORED = -100  # PyTorch's label of a token without loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBaseConfig:
    """How the base is trained. The defaults made the one that is shipped."""

    out: Path = Path("runs/tiny-base")
    """Folder of the model; new or empty."""
    steps: int = 8000
    """Updates."""
    copy_steps: int = 500
    """Updates at the beginning in which copying is the only exercise."""
    batch_size: int = 32
    """Exercises in an update."""
    learning_rate: float = 2.5e-3
    """Highest learning rate; it rises over 100 updates and falls to a hundredth as a line."""
    seed: int = 0
    """Of the weights and of the exercises."""


def build_tokenizer() -> Any:
    """A token for each word, mark and tag of the synthetic world as the `terse` layout and the `tags` dialect show it.

    Text comes back as it was, but for the space around marks that the world's sentences do not have. A word that it does not
    know is one token, `<|unknown|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write = get_dialect("tags").write
    tags = [
        tag
        for kind in OperationKind
        for tag in write(Operation(kind, " ", "m1")).replace(">", "> ").replace("</", " </").split()
        if tag.startswith("<")
    ]
    words = [
        *_SPECIAL,
        *tags,
        *_MARKERS,
        *(f"m{number}" for number in range(1, _LARGEST_ID + 1)),
        *map(str, range(10)),
        *"\n.,:;?!'()<>/-_",
        *vocabulary(),
        *(word for relation in RELATIONS for word in relation.name.split()),
        *sorted(_NOTICES.split()),
    ]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|\w+|\n|[^\w\s]"), behavior="removed", invert=True)
    glue = [(" \n", "\n"), ("\n ", "\n"), ("> ", ">"), (" <", "<"), *((f" {mark}", mark) for mark in ".,:;?!")]
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *(decoders.Replace(*pair) for pair in glue)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unknown|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """An untrained Qwen3 of a million parameters: 4 layers, width 128, 4 heads, normalised queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Wider than the usual 0.02, which is meant for models of ten times the width.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    weight.fill_(1.5)  # sharper attention from the start
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.05 if "embed" in name else weight.shape[1] ** -0.5 * (8**-0.5 if residual else 1.0)
            torch.nn.init.normal_(weight, 0.0, scale)
    return model


class Exercises:
    """Draws exercises: what the model sees, and the reply it is to give."""

    def __init__(self, split: str, seed: int) -> None:
        self.rng = random.Random(f"{split}/{seed}")
        self.copy_only = False  # the lesson to begin with: nothing else is learned before it
        self._pools = name_pools(split)
        self._words = sorted({word for pool in self._pools.values() for name in pool.names for word in name.split()})
        self._settings = EpisodeSettings()
        self._dialect = get_dialect("tags")
        self._layout = get_layout("terse")

    def draw(self) -> tuple[str, str, str]:
        """The kind of exercise, the content of the user's message, and the reply."""
        kind = self.rng.choices(_KINDS, (1, 0, 0, 0, 0) if self.copy_only else (2, 3, 2, 1, 3))[0]
        seen, operations = getattr(self, f"_{kind}")()
        observation = Observation(
            phase="", questions="", question="", chunk="", scratchpad="", query="", retrieved="", notice="",
            step=0, steps_left=0,
        )  # fmt: skip
        observation.update(seen)
        content = self._layout(observation, self._settings)[0]["content"]
        return kind, content, "\n".join(map(self._dialect.write, operations))

    def _copy(self) -> tuple[dict[str, str], list[Operation]]:
        """Sentences of random words, so that nothing but copying helps; in the first lesson all of a short text, in order."""
        words = self.rng.sample(self._words, self.rng.randint(4, 12) if self.copy_only else self.rng.randint(8, 40))
        sentences = []
        while words:
            length = self.rng.randint(3, 8)
            sentences.append(" ".join(words[:length]) + ".")
            words = words[length:]
        if self.copy_only:
            return {"chunk": "\n".join(sentences)}, [Operation(OperationKind.CREATE, text) for text in sentences]
        wanted = self.rng.sample(sentences, min(len(sentences), self.rng.randint(1, 4)))
        seen = {"query": "\n".join(" ".join(sentence.rstrip(".").split()[:2]) for sentence in wanted)}
        return self._show(seen, sentences), [Operation(OperationKind.CREATE, sentence) for sentence in wanted]

    def _find(self) -> tuple[dict[str, str], list[Operation]]:
        facts = self._facts(self.rng.randint(3, 9))
        wanted = self.rng.sample(facts, self.rng.choice((1, 1, 2)))
        queries = "\n".join(query(fact.link) for fact in wanted)
        titled = []
        for fact in facts:
            titled += [fact.link.subject, fact.sentence + self.rng.choice(("", "", "\n"))]
        seen = {"query": queries, "chunk": "\n".join(titled)}
        return seen, [Operation(OperationKind.CREATE, fact.sentence) for fact in wanted]

    def _answer(self) -> tuple[dict[str, str], list[Operation]]:
        facts = self._facts(self.rng.randint(1, 5))
        wanted = facts[0]
        known = facts[1:] if self.rng.random() < 0.1 and len(facts) > 1 else self.rng.sample(facts, len(facts))
        question = self.rng.choice(_RELATIONS[wanted.link.relation].questions).format(s=wanted.link.subject)
        seen = {"questions": question, "query": query(wanted.link), "question": question}
        answer = wanted.object if wanted in known else "unknown"
        return self._show(seen, [fact.sentence for fact in known], "retrieved"), [
            Operation(OperationKind.ANSWER, answer)
        ]

    def _link(self) -> tuple[dict[str, str], list[Operation]]:
        chain = self._chain()
        subject = self._name(chain[0].subject)
        seen = {"questions": self._ask(chain, subject)}
        if self.rng.random() < 0.7:
            seen["chunk"] = "\n".join(fact.sentence for fact in self._facts(self.rng.randint(1, 5)))
        return seen, [Operation(OperationKind.READ, query(Link(subject, chain[0].name)))]

    def _next(self) -> tuple[dict[str, str], list[Operation]]:
        chain = self._chain()
        names = [self._name(chain[0].subject)]
        names += [self._name(relation.object) for relation in chain]
        question = self._ask(chain, names[0])
        link = self.rng.randrange(len(chain))
        here = self._fact(names[link], chain[link], names[link + 1])
        others = self._facts(self.rng.randint(0, 3), near=names[link], relation=chain[link])
        entries = [here.sentence, *(fact.sentence for fact in others)]
        self.rng.shuffle(entries)
        seen = {"questions": question, "query": query(here.link), "question": question}
        last = link + 1 == len(chain)
        step = (
            Operation(OperationKind.ANSWER, names[-1])
            if last
            else Operation(OperationKind.READ, query(Link(names[link + 1], chain[link + 1].name)))
        )
        return self._show(seen, entries, "retrieved"), [step]

    def _show(self, seen: dict[str, str], sentences: list[str], where: str = "") -> dict[str, str]:
        """The sentences as a text or, with numbers that entries can have, as a memory."""
        if (where or self.rng.choice(("chunk", "retrieved"))) == "chunk":
            return {**seen, "chunk": "\n".join(sentences)}
        numbers = self.rng.sample(range(1, 13), min(12, len(sentences)))
        entries = [Entry(f"m{number}", text) for number, text in zip(numbers, sentences, strict=False)]
        return {**seen, "retrieved": self._dialect.show(entries)}

    def _chain(self) -> tuple[Relation, ...]:
        return self.rng.choice(chains(self.rng.choice((1, 2, 2, 3, 3))))

    def _ask(self, chain: tuple[Relation, ...], start: str) -> str:
        phrase = start
        for depth, relation in enumerate(chain[:-1]):
            forms = [form for form in relation.phrases if depth == 0 or form.endswith("{s}")]
            phrase = self.rng.choice(forms).format(s=phrase)
        return self.rng.choice(chain[-1].questions).format(s=phrase)

    def _facts(self, count: int, *, near: str = "", relation: Relation | None = None) -> list[Fact]:
        """Facts about different pairs of subject and relation; every other one resembles one before."""
        facts: list[Fact] = []
        taken = {(near, relation.name)} if relation else set()
        while len(facts) < count:
            like = self.rng.choice(facts) if facts and self.rng.random() < 0.5 else None
            like_relation = _RELATIONS[like.link.relation] if like else None
            kind_of = like_relation or (relation if relation and self.rng.random() < 0.5 else None)
            chosen = kind_of or self.rng.choice(RELATIONS)
            subject = self._name(chosen.subject)
            model = like.link.subject if like else near
            if model and kind_of and self.rng.random() < 0.6:
                subject = self._near(model, chosen.subject)
            elif like and like_relation and self.rng.random() < 0.4:  # another fact about the same
                chosen = self.rng.choice([other for other in RELATIONS if other.subject == like_relation.subject])
                subject = like.link.subject
            if (subject, chosen.name) not in taken:
                taken.add((subject, chosen.name))
                facts.append(self._fact(subject, chosen, self._name(chosen.object)))
        return facts

    def _fact(self, subject: str, relation: Relation, value: str) -> Fact:
        sentence = self.rng.choice(relation.statements).format(s=subject, o=value)
        return Fact(Link(subject, relation.name), value, sentence)

    def _name(self, kind: str) -> str:
        return self.rng.choice(INSTRUMENTS if kind == INSTRUMENT else self._pools[kind].names)

    def _near(self, name: str, kind: str) -> str:
        """A name that shares a word with `name`."""
        sharing = self._pools[kind].by_word.get(self.rng.choice(name.split()))
        return self.rng.choice(sharing) if sharing else self._name(kind)


Example = tuple[str, list[int], list[int]]
"""Kind of exercise, prompt ids, completion ids."""


def encode(exercises: Exercises, chat: ChatTokenizer, count: int) -> list[Example]:
    """The next exercises as token ids; those that `chat` gives one at a time, but all in one call."""
    drawn = [exercises.draw() for _ in range(count)]
    prompts = chat.backend([f"<|user|>{content}<|assistant|>" for _, content, _ in drawn])["input_ids"]
    replies = chat.backend([f"{reply}<|end|>" for _, _, reply in drawn])["input_ids"]
    return [(kind, prompt, reply) for (kind, *_), prompt, reply in zip(drawn, prompts, replies, strict=True)]


def batches(exercises: Exercises, chat: ChatTokenizer, size: int) -> Iterator[list[Example]]:
    """Endless batches, each of exercises of about the same length: little padding."""
    while True:
        pool = sorted(encode(exercises, chat, 16 * size), key=lambda example: len(example[1]) + len(example[2]))
        starts = list(range(0, len(pool), size))
        exercises.rng.shuffle(starts)
        yield from (pool[start : start + size] for start in starts)


def _tensors(batch: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and labels [B, T], padded on the right."""
    width = max(len(prompt) + len(reply) for _, prompt, reply in batch)
    ids = torch.full((len(batch), width), pad_id)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, (_, prompt, reply) in enumerate(batch):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return ids, labels


@torch.no_grad()
def exact_replies(model: Any, batch: list[Example], pad_id: int) -> dict[str, float]:
    """The share of replies, by kind of exercise, of which greedy sampling would get every token right."""
    ids, labels = _tensors(batch, pad_id)
    right = model(input_ids=ids).logits[:, :-1].argmax(-1) == labels[:, 1:]
    exact = (right | (labels[:, 1:] == _IGNORED)).all(-1).tolist()
    by_kind: dict[str, list[bool]] = {}
    for (kind, *_), hit in zip(batch, exact, strict=True):
        by_kind.setdefault(kind, []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(by_kind.items())}


def train(run: TinyBaseConfig, console: Console | None = None) -> None:
    """Trains the base and writes it."""
    run.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, run.seed)
    tokenizer.save_pretrained(run.out)
    chat = ChatTokenizer(run.out)
    held_out = encode(Exercises("dev", run.seed), chat, 512)
    exercises = Exercises("train", run.seed)
    exercises.copy_only = True
    drawn = batches(exercises, chat, run.batch_size)
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or "embed" in name]
    # Muon (Jordan et al. 2024) on the matrices takes about a third fewer updates to the same loss here than AdamW alone.
    optimizers = [
        torch.optim.Muon(matrices, lr=2 * run.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=run.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (1 - 0.99 * step / run.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    lines, losses, tokens, started = [], [], 0, time.perf_counter()
    for step in track(range(1, run.steps + 1), "training the base", console=console or Console(stderr=True)):
        exercises.copy_only = step < run.copy_steps
        ids, labels = _tensors(next(drawn), tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != _IGNORED  # right padding needs no mask: nothing that counts attends to it
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), labels[:, 1:][trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        tokens += ids.numel()
        if step % 100 == 0 or step == run.steps:
            exact = exact_replies(model, held_out, tokenizer.pad_token_id)
            line = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 4),
                "exact": {kind: round(share, 3) for kind, share in exact.items()},
                "tokens": tokens,
                "seconds": round(time.perf_counter() - started, 1),
            }
            lines.append(line)
            losses.clear()
            write_atomic(run.out / "metrics.jsonl", "".join(map(to_jsonl, lines)))
    model.save_pretrained(run.out)
    draw_lessons(run.out / "metrics.jsonl", run.out / "curve.png")


def draw_lessons(metrics: Path, picture: Path) -> None:
    """Draws how many replies to exercises on held-out names were exact, by kind, over the updates."""
    from matplotlib.figure import Figure

    lines = read_jsonl(metrics)
    figure = Figure(figsize=(7.0, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind in _KINDS:
        axes.plot([line["step"] for line in lines], [100 * line["exact"][kind] for line in lines], label=kind)
    axes.set_xlabel("update")
    axes.set_ylabel("exact replies, held-out names [%]")
    axes.set_ylim(0, 101)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    train(tyro.cli(TinyBaseConfig, config=(tyro.conf.OmitArgPrefixes,)))
