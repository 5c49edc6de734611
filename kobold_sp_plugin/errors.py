"""The exception tree: one named error per fault.

::

    SoftPromptError
    ├── FormatError                 a file cannot be read as a soft prompt, or rows cannot be written as one
    │   ├── NotASoftPromptFile      neither a zip nor a tensor nor a folder that holds one
    │   ├── NoTensor                a zip or folder without tensor.npy
    │   ├── EncryptedMember         a zip member that needs a password
    │   ├── UnsupportedCompression  a zip member that is not stored, deflated or LZMA
    │   ├── CorruptMember           a zip member whose bytes cannot be unpacked, or whose checksum is wrong
    │   ├── DuplicateMember         two zip members of one name
    │   ├── UnsafeName              a member or file name that leaves its folder
    │   ├── TooLarge                more bytes than allowed: declared, unpacked, or as an LZMA dictionary
    │   ├── BadTensorHeader         not an .npy header
    │   ├── ObjectDtype             Python objects, which only a pickle could hold
    │   ├── UnsupportedDtype        a dtype that holds no rows
    │   ├── WrongRank               not [n_tokens, width]
    │   ├── NoRows                  no rows or no columns
    │   ├── TooManyRows             2048 rows or more
    │   ├── TruncatedTensor         fewer bytes than the header promises
    │   ├── TrailingBytes           more bytes than the header promises
    │   ├── NotFinite               NaN or infinity among the values
    │   ├── MetadataTooLarge        meta.json past its limit
    │   ├── MetadataNotUTF8         meta.json in another encoding
    │   └── MetadataNotJSON         meta.json that does not parse
    ├── CompatibilityError          a soft prompt and a model that do not go together
    │   ├── WidthMismatch           another number of columns than the model's embedding
    │   └── ContextExceeded         soft tokens, text and new tokens do not fit the context
    ├── ModelError                  a model that soft tokens cannot be given to
    │   ├── NoEmbedding             no input embedding that takes token ids
    │   ├── UnsupportedModel        a kind of model that soft tokens are not made for
    │   └── UnsupportedCall         a way of calling the model that soft tokens cannot follow
    ├── SelectionError              a choice from the menu that cannot be carried out
    │   ├── NoModel                 nothing is loaded that could use a soft prompt
    │   └── UnknownSoftPrompt       no such file in the folder
    ├── HostError                   a host application that is not the one a hook knows
    └── TrainingError               a training that cannot begin or go on
        ├── BadSetting              a setting with a value that cannot be
        ├── NoData                  nothing to learn from
        ├── DataNotUnderstood       a file of data that is not in a form that is known
        ├── NotEnoughMemory         no batch, not even of one text, fits
        ├── CheckpointMismatch      a checkpoint of another training
        └── Diverged                a loss that is no number any more
"""

from typing import Optional


class SoftPromptError(Exception):
    """Base of every error that this package raises on purpose; its text is fit to be shown to a user."""


class FormatError(SoftPromptError):
    """A file that cannot be read as a soft prompt, or rows that cannot be written as one.

    ``found`` and ``expected`` are the two halves of the sentence that the error prints; ``path`` is
    the file, where one is known.
    """

    def __init__(self, found: str, expected: str, path: Optional[str] = None):
        self.found = found
        self.expected = expected
        self.path = path
        super().__init__(found, expected, path)

    @property
    def sentence(self) -> str:
        """What was found and what was expected, without the path."""
        return f"{self.found}; expected {self.expected}"

    def __str__(self) -> str:
        return f"{self.path}: {self.sentence}" if self.path else self.sentence


class NotASoftPromptFile(FormatError):
    """Neither a zip nor a tensor nor a folder that holds one."""


class NoTensor(FormatError):
    """A zip or a folder without ``tensor.npy``."""


class EncryptedMember(FormatError):
    """A zip member that needs a password."""


class UnsupportedCompression(FormatError):
    """A zip member that is not stored, deflated or LZMA-compressed."""


class CorruptMember(FormatError):
    """A zip member whose bytes cannot be unpacked, or whose checksum is wrong."""


class DuplicateMember(FormatError):
    """Two zip members of one name: readers disagree on which one counts."""


class UnsafeName(FormatError):
    """A member or file name that leaves its folder: absolute, or with ``..``."""


class TooLarge(FormatError):
    """More bytes than allowed: declared, unpacked, or as the dictionary of an LZMA stream."""


class BadTensorHeader(FormatError):
    """Bytes that are not an ``.npy`` header."""


class ObjectDtype(FormatError):
    """A tensor of Python objects; reading it would execute a pickle, so it never is read."""


class UnsupportedDtype(FormatError):
    """A dtype that does not hold rows: not float16, bfloat16, float32 or float64."""


class WrongRank(FormatError):
    """An array that is not ``[n_tokens, width]`` (nor ``[1, n_tokens, width]``)."""


class NoRows(FormatError):
    """An array without rows or without columns."""


class TooManyRows(FormatError):
    """2048 rows or more, which KoboldAI refuses."""


class TruncatedTensor(FormatError):
    """Fewer bytes than the tensor's header promises."""


class TrailingBytes(FormatError):
    """More bytes than the tensor's header promises."""


class NotFinite(FormatError):
    """NaN or infinity among the values, in the file or in the dtype that is to be written."""


class MetadataTooLarge(FormatError):
    """A ``meta.json`` past its limit."""


class MetadataNotUTF8(FormatError):
    """A ``meta.json`` that is not UTF-8."""


class MetadataNotJSON(FormatError):
    """A ``meta.json`` that is not JSON, or metadata that JSON cannot hold."""


class CompatibilityError(SoftPromptError):
    """A soft prompt and a model that do not go together."""


class WidthMismatch(CompatibilityError):
    """The soft prompt has another number of columns than the model's input embedding."""


class ContextExceeded(CompatibilityError):
    """Soft tokens, text and new tokens do not fit the model's context."""


class ModelError(SoftPromptError):
    """A model that soft tokens cannot be given to."""


class NoEmbedding(ModelError):
    """A model without an input embedding that takes token ids."""


class UnsupportedModel(ModelError):
    """A kind of model that soft tokens are not made for, such as one with an encoder."""


class UnsupportedCall(ModelError):
    """A way of calling the model that soft tokens cannot follow, such as ``inputs_embeds``."""


class SelectionError(SoftPromptError):
    """A choice from the menu that cannot be carried out; the selection stays what it was."""


class NoModel(SelectionError):
    """Nothing is loaded that could use a soft prompt."""


class UnknownSoftPrompt(SelectionError):
    """There is no such file in the softprompts folder."""


class HostError(SoftPromptError):
    """A host application that is not the one a hook knows; nothing was changed."""


class TrainingError(SoftPromptError):
    """A training that cannot begin or go on; what was trained until then is kept."""


class BadSetting(TrainingError):
    """A setting with a value that cannot be."""


class NoData(TrainingError):
    """Nothing to learn from: no files, or none with text in them."""


class DataNotUnderstood(TrainingError):
    """A file of data that is not in a form that is known; the text names file and line."""


class NotEnoughMemory(TrainingError):
    """Not even a single text fits the memory."""


class CheckpointMismatch(TrainingError):
    """A checkpoint of a training on other data, another model or with other settings."""


class Diverged(TrainingError):
    """A loss that is no number any more."""
