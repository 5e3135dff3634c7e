"""The recipe of the shipped base model, and the model that it made."""

import hashlib
from pathlib import Path

import gymnasium as gym
import pytest

from agents.baselines.world_reader import query, read_fact, read_query
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.registry import load_policy
from agents.rollout import play_episode
from atommem_env.prompts import get_layout
from atommem_env.tasks.synthetic import vocabulary
from train.tiny_base import Exercises, TinyBaseConfig, build_tokenizer, encode, exact_replies, train

TASK = {"num_docs": 6, "chunk_tokens": 64, "capacity": 6, "scratchpad": False, "durability": "off"}


def test_the_shipped_tokenizer_is_the_recipes() -> None:
    assert ChatTokenizer(find_model("tiny")).backend.get_vocab() == build_tokenizer().get_vocab()


def test_every_word_of_an_episode_has_a_token_and_replies_come_back_as_they_were() -> None:
    chat = ChatTokenizer(find_model("tiny"))
    unknown = chat.backend.unk_token_id
    assert all(unknown not in chat.backend(word)["input_ids"] for word in vocabulary())
    env = gym.make("AtomMem-Synthetic", **TASK)
    settings = env.unwrapped.settings  # type: ignore[attr-defined]
    for seed in range(5):
        for turn in play_episode(env, load_policy("store-all", settings), seed=seed).turns:
            assert unknown not in chat.prompt_ids(get_layout("terse")(turn.observation, settings))
            assert chat.text(chat.completion_ids(turn.reply.text)) == turn.reply.text


def test_exercises_are_in_the_form_of_the_chat_template_and_the_same_for_the_same_seed() -> None:
    chat = ChatTokenizer(find_model("tiny"))
    drawn, encoded = Exercises("train", 3), encode(Exercises("train", 3), chat, 60)
    for kind, prompt, reply in encoded:
        drawn_kind, content, text = drawn.draw()
        assert kind == drawn_kind
        assert prompt == chat.prompt_ids([{"role": "user", "content": content}])
        assert reply == chat.completion_ids(text)
    assert {kind for kind, *_ in encoded} == {"copy", "find", "answer", "link", "next"}


def test_exercises_are_those_that_the_shipped_base_was_trained_on() -> None:
    exercises, digest = Exercises("train", 0), hashlib.sha256()
    for _ in range(500):
        digest.update(repr(exercises.draw()).encode())
    assert digest.hexdigest() == "9575b0ca0ade68e21de0f94ad5445d7bc223b03b8f44ab52fb1d93303770c46a"


def test_the_teacher_reads_the_facts_that_exercises_state() -> None:
    facts = Exercises("train", 1)._facts(300)
    assert [read_fact(fact.sentence) for fact in facts] == facts
    assert [read_query(query(fact.link)) for fact in facts] == [fact.link for fact in facts]


def test_the_shipped_base_reads_held_out_names() -> None:
    transformers = pytest.importorskip("transformers")
    folder = find_model("tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    chat = ChatTokenizer(folder)
    exact = exact_replies(model, encode(Exercises("dev", 11), chat, 200), chat.backend.pad_token_id)
    assert exact["copy"] > 0.9
    assert min(exact.values()) > 0.8
    assert (folder / "model.safetensors").stat().st_size < 8_000_000


def test_the_recipe_runs_and_learns(tmp_path: Path) -> None:
    train(TinyBaseConfig(out=tmp_path / "base", steps=6, copy_steps=3, batch_size=4))
    assert (tmp_path / "base" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert find_model(str(tmp_path / "base"))
