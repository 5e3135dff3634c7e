"""The error hierarchy: every error of this project is an `AtomMemError` and also a standard exception class.

What a *policy* writes is never an error (see `atommem_env.types.Fault`). These are for wrong settings, bad data and
infrastructure failures; each message says what was expected, what came, and what to do.
"""


class AtomMemError(Exception):
    """Base of all errors raised on purpose by this project."""


class SettingError(AtomMemError, ValueError):
    """A setting has an invalid value."""


class OutOfRange(SettingError, IndexError):
    """A task that a source does not have, by its index or its seed."""


class DataError(AtomMemError, ValueError):
    """A data file is damaged or has another form than expected; the message names file, line and field."""


class DatasetNotFound(AtomMemError, FileNotFoundError):
    """The data are neither given nor imported; the message names the command that imports them."""


class ModelNotFound(AtomMemError, FileNotFoundError):
    """Model weights are not on this machine; the message names the command that fetches them."""


class MissingDependency(AtomMemError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class ShadowedPackage(AtomMemError, ImportError):
    """Another distribution's package of the same name shadows this project's; the message names that distribution."""


class EpisodeStateError(AtomMemError, RuntimeError):
    """A call that the episode's state does not allow, for example `resolve` without `submit`."""


class EmbeddingError(AtomMemError, RuntimeError):
    """An embedder failed or returned vectors of the wrong shape; an infrastructure failure, never a reward."""


class PluginError(AtomMemError, ImportError):
    """A user-defined part, named as `module:attribute`, cannot be found."""


class PolicyError(AtomMemError, RuntimeError):
    """A policy raised, or returned something other than a reply; an infrastructure failure, never a reward."""


class EngineDied(AtomMemError, RuntimeError):
    """The engine that a model runs in has died; replaying the episode does not restart it."""


class JobFailed(AtomMemError, RuntimeError):
    """A job, or a service that it needs, ended early; the message gives the cause and names the log."""


class ModelError(AtomMemError, RuntimeError):
    """A model service failed, rejected a request or sent an invalid response; an infrastructure failure, never a reward."""


class ReplyRefused(ModelError):
    """A model service will not reply to this one prompt, however often it is asked: its content policy blocks it.

    Other prompts are not affected; asking again, or `--resume`, does not help.
    """


class PromptTooLong(AtomMemError, ValueError):
    """A prompt and its reply do not fit into the model's context window.

    Attributes:
        tokens: of the prompt; None: the service did not report it.
        room: most tokens that the prompt could have had; None: the service did not report it.
    """

    def __init__(self, message: str, tokens: int | None = None, room: int | None = None) -> None:
        super().__init__(message)
        self.tokens, self.room = tokens, room


class StoreError(AtomMemError, RuntimeError):
    """A memory store cannot be opened, read or written as asked."""


class SamplesMismatch(AtomMemError, RuntimeError):
    """The samples that were trained on are not the samples that were generated."""


class CheckpointError(AtomMemError, OSError):
    """A training checkpoint cannot be written or read; the message says what is still intact."""
