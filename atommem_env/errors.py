"""The error tree: every error of ours is an `AtomMemError` and also the standard class that it stands for.

What a *policy* writes is never an error (see `atommem_env.types.Fault`). These are for wrong settings, bad data and
infrastructure that failed; each message says what was expected, what came, and what to do about it.
"""


class AtomMemError(Exception):
    """Base of all errors raised on purpose by this project."""


class SettingError(AtomMemError, ValueError):
    """A setting has a value that cannot work."""


class OutOfRange(SettingError, IndexError):
    """A task that a source does not have, by its index or its seed."""


class DataError(AtomMemError, ValueError):
    """A data file is damaged or not of the expected form; the message names file, line and field."""


class DatasetNotFound(AtomMemError, FileNotFoundError):
    """No data were given and none were imported; the message names the command that imports them."""


class ModelNotFound(AtomMemError, FileNotFoundError):
    """Weights are not on this machine; the message names the command that fetches them."""


class MissingDependency(AtomMemError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class ShadowedPackage(AtomMemError, ImportError):
    """Another distribution's package of the same name hides ours; the message names the culprit."""


class EpisodeStateError(AtomMemError, RuntimeError):
    """A call that this moment of an episode does not allow, for example `resolve` without `submit`."""


class EmbeddingError(AtomMemError, RuntimeError):
    """An embedder failed or returned vectors of the wrong shape; an infrastructure failure, never a reward."""


class PluginError(AtomMemError, ImportError):
    """A part of one's own, named as `module:attribute`, cannot be found."""


class PolicyError(AtomMemError, RuntimeError):
    """A policy raised or returned something that is not a reply; an infrastructure failure, never a reward."""


class EngineDied(AtomMemError, RuntimeError):
    """The engine that a model runs in is gone; playing an episode anew cannot bring it back."""


class JobFailed(AtomMemError, RuntimeError):
    """A job, or a service that it needs, ended before it was done; the message gives the cause and names the log."""


class ModelError(AtomMemError, RuntimeError):
    """A model's service failed, refused a request or sent something else; an infrastructure failure, never a reward."""


class PromptTooLong(AtomMemError, ValueError):
    """A prompt and its reply do not fit into the model's window.

    Attributes:
        tokens: of the prompt; None: the service did not say.
        room: most tokens that the prompt could have had; None: the service did not say.
    """

    def __init__(self, message: str, tokens: int | None = None, room: int | None = None) -> None:
        super().__init__(message)
        self.tokens, self.room = tokens, room


class StoreError(AtomMemError, RuntimeError):
    """A memory store cannot be opened, read or written as asked."""


class SamplesMismatch(AtomMemError, RuntimeError):
    """The samples that were trained on are not the samples that were made."""


class CheckpointError(AtomMemError, OSError):
    """A training checkpoint cannot be written or read; the message says what is still intact."""
