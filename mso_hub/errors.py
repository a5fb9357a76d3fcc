"""One exception tree. Each message names the thing, the limit, what was found and the way out.

MsoError               anything this package refuses to do; the CLI prints it and exits with code 2
|-- CheckpointError    the input is broken: header, index, offsets, names
|-- RecipeError        the settings contradict themselves or name something that does not exist
|-- PlanError          the settings do not fit this checkpoint; nothing was written
|-- NonFiniteError     a weight holds NaN or Inf
|-- SinkError          the output cannot be written: permission, space, something in the way
|-- HubError           the Hub refuses: no such repo, no permission, a file that is not what it says
|   `-- TransientError the Hub or the network failed for long; the same command may succeed later (exit code 3)
|-- ResumeError        an unfinished run lies there that this one must not continue
|-- VerifyError        a finished checkpoint does not hold what it promises
`-- SmokeError         vLLM does not load a checkpoint, or could not be asked
"""

from __future__ import annotations


class MsoError(Exception):
    """Base of everything that mso_hub raises on purpose."""


class CheckpointError(MsoError, ValueError):
    """A safetensors header, an index or a config of the input cannot be trusted."""


class RecipeError(MsoError, ValueError):
    """A setting is unknown, contradicts another one or points at nothing."""


class PlanError(MsoError, ValueError):
    """The recipe does not fit the checkpoint; raised from headers alone, before a byte is written."""


class NonFiniteError(MsoError, ValueError):
    """A weight that has to be quantized holds NaN or Inf."""


class SinkError(MsoError, OSError):
    """The output cannot be written."""


class HubError(MsoError, OSError):
    """The Hub refuses a request, or holds something else than it announces."""


class TransientError(HubError):
    """The Hub or the network did not answer for as long as we wait; what is complete is kept."""


class ResumeError(MsoError):
    """The unfinished run at the output belongs to another source, recipe or process."""


class VerifyError(MsoError):
    """A checkpoint was read to the end and does not hold what its index or config promises."""


class SmokeError(MsoError):
    """vLLM does not load a checkpoint as it is stored, or could not be asked whether it does."""
