"""The one error tree of the data floor. Every message names the thing at fault and says what to do."""


class PipelineError(Exception):
    """Anything a user can put right: bad input, a missing client, a damaged shard."""


class BadSample(PipelineError):
    """One sample cannot be used. `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class ShardError(PipelineError):
    """A shard, its index or its manifest is damaged, or does not belong to the others."""


class MissingField(PipelineError):
    """A consumer needs a batch field that the data does not provide."""


class UnsafeInput(PipelineError):
    """Input refused before it could cost memory, time or safety."""


class ConfigError(PipelineError):
    """A recipe, an override or an option does not make sense. Names the key, the value and what is allowed."""


class BundleError(PipelineError):
    """A model folder is missing something, is damaged, or was written by a newer version."""
