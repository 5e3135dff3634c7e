"""The Gymnasium environment."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Self, get_type_hints

import gymnasium as gym
from gymnasium.utils import EzPickle
from numpy.typing import ArrayLike

from atommem_env.dialects import get_dialect
from atommem_env.embedders import Embedder, embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.errors import SettingError
from atommem_env.plugins import name_of, suggest
from atommem_env.rewards import get_reward
from atommem_env.spaces import Text
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import Recorder
from atommem_env.store.session import EpisodeSession
from atommem_env.tasks import SOURCES, Source, make_source, source_options
from atommem_env.types import (
    ABLATIONS,
    EmbeddingRequest,
    EpisodeSettings,
    Fault,
    Observation,
    OperationResult,
)

_MOST_STEPS = 2**31 - 1  # upper bound of the integer spaces; no episode comes near it
SETTING_NAMES = frozenset(field.name for field in dataclasses.fields(EpisodeSettings))


class AtomMemEnv(gym.Env[Observation, str], EzPickle):
    """A reader that sees each chunk of a document once, and a memory that it manages itself.

    ## Description
    A long document is shown chunk by chunk. With each reply the policy may Create, Read, Update and Delete entries of an
    external memory and rewrite a scratchpad; after the last chunk it answers questions from what it stored. The decision
    process is that of AtomMem (arXiv 2601.08323). The tasks are multi-hop questions from HotpotQA, 2WikiMultiHopQA and
    MuSiQue among distracting documents, from a procedural world, or about your own files.

    Without the policy and the embedder a step takes about 0.2 ms (vectors of 1024 numbers), reset about 10 ms at 800 documents
    and 80 ms at 6,400, on one core (`eval/benchmarks/environment.py`, `tasks.py`).

    ## Action Space
    `Text()`: any `str`. The operations in it are carried out in the order written; in the dialect `tags` (others are
    `public_code` and `tool_calls`):

    | text                                                | operation                                                |
    |-----------------------------------------------------|----------------------------------------------------------|
    | `<create_memory>text</create_memory>`               | a new entry                                              |
    | `<read_memory>query</read_memory>`                  | its results are shown from the next observation on       |
    | `<update_memory>m3: text</update_memory>`           | replaces an entry                                        |
    | `<delete_memory>m3</delete_memory>`                 | removes an entry                                         |
    | `<update_scratchpad>text</update_scratchpad>`       | replaces the scratchpad                                  |
    | `<final_answer>text</final_answer>`                 | answers the question asked; `\\boxed{text}` may be inside |

    ## Observation Space
    A `Dict`; the keys are those of `atommem_env.types.Observation`: the texts `phase`, `questions`, `question`, `chunk`,
    `scratchpad`, `query`, `retrieved` and `notice`, and the integers `step` and `steps_left`.

    ## Starting State
    The first chunk, an empty memory and an empty scratchpad. `reset(seed=…)` draws the task; `reset(options={"index": i})`
    selects it, and `options={"index": i, "seed": s}` also fixes the draw of its documents. `options={"resume": id}` resumes
    an interrupted episode of the store.

    ## Dynamics
    Every reply advances to the next chunk. The observation after a reply shows the active query's results in the memory *after*
    that reply's writes; a query stays active until the next Read. After the last chunk the questions are asked one at a time;
    a question is resolved by an answer, or unanswered after `replies_per_question` replies. An operation that cannot be
    carried out is a fault: it is reported in `notice`, counted in `info`, and changes nothing else.

    ## Rewards
    0 on every step but the last; there the mean exact match over the task's graded questions, by the dataset's own rule, in
    [0, 1]. A question without a gold is not graded; the reward of a task that has no other is 0.
    `reward_terms={name: weight}` adds weighted shares in [0, 1] to that: `faults` (replies with a fault), `reads` (replies with
    a Read), `steps` (of the step budget), `memory_size` (tokens stored, of the document's) and `evidence_stored`. The paper
    has none of them.

    ## Episode End
    `terminated` when all questions are resolved. `truncated` when `max_steps` replies were given first.

    ## Information
    After `reset`: `task_id`, `task_index`, `task_seed`. After `step`: `entries` (in memory), `operations` (carried out, by
    kind) and `faults` (by kind) of this reply. At the end also `stop_reason`, `predictions`, `golds`, `supporting_facts`,
    `em`, `f1` and `evidence` (passages, how many were stored, how many retrieved), each a tuple with one item per question;
    `em` and `f1` of a question without a gold are None.

    ## Arguments
    * `embedder` ("hashing"): "hashing", "minilm", "st:MODEL" (of sentence-transformers), "openai:MODEL" (a service, at
      OPENAI_BASE_URL), an object with the methods of `atommem_env.embedders.Embedder`, or `module:attribute` of one.
    * `source`: the task source; each id has its own, and `AtomMem-Custom` none. A list of `atommem_env.Task`, an object
      like `atommem_env.types.TaskSource`, a class or function that returns one, or `module:attribute` of any of these.
    * `store` (None): the LanceDB folder for the memories, or a `MemoryStore`, which its creator closes; None is a
      temporary folder, removed by `close()` or at the end of the process.
    * `durability` ("episode"): "episode": committed when the episode ends, is left or the environment is closed; "step":
      before `step` returns; "off": never.
    * `render_mode` (None): "ansi" or "human".
    * `ablation` (None): one of the paper's by name: `no_update`, `no_delete`, `no_scratchpad`, `no_storage`, `no_memory`,
      `random_retrieval`; `atommem_env.types.ABLATIONS` says what each one sets.
    * any field of `atommem_env.EpisodeSettings`, for example `chunk_tokens`, `top_k`, `operations`, `capacity`. `dialect` and
      `reward` also take your own object, or its `module:attribute`.
    * any option of the task source: `split`, `data`, `corpus`, `num_docs`, `questions` for the datasets
      (`atommem_env.tasks.haystack`), `hops`, `corrections` and others for the synthetic one (`atommem_env.tasks.synthetic`),
      `files`, `data`, `question` and `questions` for your own files (`atommem_env.tasks.files`).

    ## Version History
    * v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 1}  # noqa: RUF012 (declared so by Env)

    def __init__(
        self,
        source: Source | None = None,
        *,
        embedder: str | Embedder = "hashing",
        store: str | Path | MemoryStore | None = None,
        durability: str = "episode",
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        EzPickle.__init__(
            self,
            source,
            embedder=embedder,
            store=store,
            durability=durability,
            render_mode=render_mode,
            **options,
        )
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise SettingError(f"render_mode must be None, 'ansi' or 'human', got {render_mode!r}.")
        self.settings, source_kwargs = split_options(source, options)
        assert source is not None  # or split_options would have said so
        get_dialect(self.settings.dialect)  # wrong settings fail here, before any episode
        get_reward(self.settings.reward)
        self.source = make_source(source, **source_kwargs)
        defaults = {name: option.default for name, option in source_options(source).items()}
        self.source_options = {**defaults, **source_kwargs}  # of the task source, defaults included
        if not (isinstance(source, str) and source in SOURCES):
            self.source_options["source"] = name_of(source)
        self.embedder = get_embedder(embedder) if isinstance(embedder, str) else embedder
        self.embedder_name = embedder if isinstance(embedder, str) else embedder.name
        self.store = open_store(store, durability)
        self._owns_store = self.store is not store
        self.store.expect_dimension(self.embedder.dimension)
        self.render_mode = render_mode
        self.episode: Episode | None = None
        self.results: tuple[OperationResult, ...] = ()  # of the last reply
        self._session: EpisodeSession | None = None
        count = gym.spaces.Discrete(_MOST_STEPS)
        self.action_space = Text()
        self.observation_space = gym.spaces.Dict(  # type: ignore[assignment]  # a TypedDict is a dict
            {name: Text() if kind is str else count for name, kind in get_type_hints(Observation).items()}
        )

    @property
    def env_id(self) -> str:
        """The id that `gym.make` was called with, or the class's name."""
        return self.spec.id if self.spec else type(self).__name__

    @property
    def episode_id(self) -> str:
        """The name of the running episode in the store; "" before the first reset."""
        return self._session.recorder.episode_id if self._session else ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._leave()
        options = options or {}
        unknown = sorted(set(options) - {"index", "seed", "resume"})
        if unknown:
            raise SettingError(f"reset has the options index, seed and resume, got {', '.join(unknown)}.")
        # All three are drawn each time, so that naming one does not change the others.
        draws = [int(self.np_random.integers(high)) for high in (len(self.source), 2**31, 2**31)]
        if "resume" in options:
            index, task_seed = self._resume(str(options["resume"]))
        else:
            index, task_seed = int(options.get("index", draws[0])), int(options.get("seed", draws[1]))
            self._begin(index, task_seed, draws[2])
        assert self.episode is not None
        if self.render_mode == "human":
            self.render()
        info = {"task_id": self.episode.task.id, "task_index": index, "task_seed": task_seed}
        return self.episode.observe(), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        return self.resolve(action, embed(self.embedder, self.submit(action)))

    def submit(self, action: str) -> tuple[EmbeddingRequest, ...]:
        """The first half of `step`, for callers that embed for many environments at once: see `Episode.submit`."""
        if self.episode is None:
            raise gym.error.ResetNeeded("Call reset() before step().")
        return self.episode.submit(action)

    def resolve(self, action: str, vectors: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """The second half: carries out the `action` that was submitted, given the requested vectors, and records it."""
        assert self._session is not None
        result = self._session.resolve(action, vectors)
        episode = self._session.episode
        self.results = result.results
        info: dict[str, Any] = {"entries": len(episode.memory), **count_results(result.results)}
        if episode.stop_reason is not None:
            info |= outcome_info(episode)
        self._write(self._session.recorder)
        if self.render_mode == "human":
            self.render()
        return result.observation, result.reward, result.terminated, result.truncated, info

    def fork(self) -> Self:
        """An independent copy in the middle of an episode: both continue from here, and draw the same episodes afterwards.

        Nothing that the copy does is stored. Of an environment of `gym.make`: `env.unwrapped.fork()`.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if self._session is None:
            raise gym.error.ResetNeeded("Call reset() before fork().")
        twin = object.__new__(type(self))  # not copy.copy, for which EzPickle makes a new environment
        vars(twin).update(vars(self), store=MemoryStore(self.store.folder, "off"), _owns_store=False)
        twin._session = self._session.fork()
        twin.episode = twin._session.episode
        twin.np_random = copy.deepcopy(self.np_random)
        return twin

    def render(self) -> str | None:
        """The observation as text: returned with `ansi`, printed with `human`."""
        if self.render_mode is None or self.episode is None:
            return None
        text = "\n".join(f"{name}: {value}" for name, value in self.episode.observe().items() if value != "")
        if self.render_mode == "ansi":
            return text
        print(text, end="\n\n")
        return None

    def close(self) -> None:
        self._leave()
        if self._owns_store:
            self.store.close()

    def _begin(self, index: int, task_seed: int, episode_seed: int) -> None:
        self._session = EpisodeSession.begin(
            self.store,
            self.source,
            self.settings,
            env_id=self.env_id,
            index=index,
            task_seed=task_seed,
            episode_seed=episode_seed,
        )
        self.episode = self._session.episode

    def _leave(self) -> None:
        """Stores the memory of an episode that is abandoned."""
        if self.episode is not None and self._session is not None:
            if self._session.leave():
                self._write(self._session.recorder)
            self.episode = self._session = None

    def _write(self, recorder: Recorder) -> None:
        self.store.write([recorder])

    def _resume(self, episode_id: str) -> tuple[int, int]:
        """Replays an interrupted episode of the store; returns the index and the seed of its task."""
        self._session, record = EpisodeSession.resume(self.store, self.source, self.settings, episode_id)
        self.episode = self._session.episode
        return record.index, record.task_seed


def open_store(store: str | Path | MemoryStore | None, durability: str) -> MemoryStore:
    """The store of an environment's arguments; a `MemoryStore` is returned as given, and its creator closes it."""
    if isinstance(store, MemoryStore):
        return store
    return MemoryStore.temporary(durability) if store is None else MemoryStore(store, durability)


def split_options(source: Source | None, options: dict[str, Any]) -> tuple[EpisodeSettings, dict[str, Any]]:
    """Sorts keyword arguments into settings of the episode, an ablation's among them, and options of the task source.

    Raises:
        SettingError: an argument is neither, or the ablation sets it as well; the message lists the known names.
    """
    if source is None:
        raise SettingError(
            "This environment plays your own tasks: give source=, a list of atommem_env.Task, an object like "
            "atommem_env.types.TaskSource, a function that returns one, or module:attribute of any of these."
        )
    of_source = set(source_options(source))
    options = {**options}
    ablation = options.pop("ablation", None)
    if "dataset" in options:
        raise SettingError("The argument dataset is called source now.")
    unknown = sorted(set(options) - SETTING_NAMES - of_source)
    if unknown:
        known = sorted(SETTING_NAMES | of_source | {"ablation", "embedder", "store", "durability"})
        near = suggest(unknown[0], known) or "."
        raise SettingError(f"No setting is called {', '.join(unknown)}{near} There are: {', '.join(known)}.")
    if ablation is not None:
        if not isinstance(ablation, str) or ablation not in ABLATIONS:
            near = suggest(str(ablation), ABLATIONS) or "."
            raise SettingError(f"ablation must be one of {', '.join(ABLATIONS)}, got {ablation!r}{near}")
        twice = sorted(set(ABLATIONS[ablation]) & set(options))
        if twice:
            raise SettingError(f"ablation={ablation!r} sets {', '.join(twice)}; leave that out, or the ablation.")
        options |= ABLATIONS[ablation]
    settings = EpisodeSettings(**{name: value for name, value in options.items() if name in SETTING_NAMES})
    return settings, {name: value for name, value in options.items() if name in of_source}


def count_results(results: tuple[OperationResult, ...]) -> dict[str, dict[str, int]]:
    """How many operations were carried out and how many faults there were, by kind.

    >>> from atommem_env.types import OperationKind
    >>> count_results((OperationResult(OperationKind.CREATE), OperationResult(OperationKind.READ, Fault.EMPTY)))
    {'operations': {'create': 1}, 'faults': {'empty': 1}}
    """
    done = Counter(str(result.kind) for result in results if result.kind and result.fault in (None, Fault.TRUNCATED))
    faults = Counter(str(result.fault) for result in results if result.fault is not None)
    return {"operations": dict(done), "faults": dict(faults)}


def outcome_info(episode: Episode) -> dict[str, Any]:
    """The part of `info` that is there once the episode is over."""
    questions = episode.task.questions
    return {
        "stop_reason": str(episode.stop_reason),
        "predictions": tuple(outcome.prediction for outcome in episode.outcomes),
        "golds": tuple(question.answers for question in questions),
        "supporting_facts": tuple(
            tuple((fact.title, fact.text) for fact in question.evidence) for question in questions
        ),
        "em": tuple(outcome.em for outcome in episode.outcomes),
        "f1": tuple(outcome.f1 for outcome in episode.outcomes),
        "evidence": tuple((outcome.evidence, outcome.stored, outcome.retrieved) for outcome in episode.outcomes),
    }
