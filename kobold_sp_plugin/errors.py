"""The exception tree: one named error per fault.

::

    SoftPromptError
    ├── FormatError                 a file cannot be read as a soft prompt, or rows cannot be written as one
    │   ├── NotASoftPromptFile      a file of no known format
    │   ├── NoTensor                a zip, folder or file without the tensor that its format has
    │   ├── EncryptedMember         a zip member that needs a password
    │   ├── UnsupportedCompression  a zip member that is not stored, deflated or LZMA
    │   ├── CorruptMember           a part of a file that cannot be unpacked, or whose checksum is wrong
    │   ├── DuplicateMember         two zip members of one name
    │   ├── UnsafeName              a member or file name that leaves its folder
    │   ├── TooLarge                more bytes than allowed: declared, unpacked, or as an LZMA dictionary
    │   ├── BadTensorHeader         not a tensor's header, or one that contradicts itself
    │   ├── ObjectDtype             Python objects, which only a pickle could hold
    │   ├── UnsupportedDtype        a dtype that holds no rows
    │   ├── WrongRank               not [n_tokens, width]
    │   ├── NoRows                  no rows or no columns
    │   ├── TooManyRows             2048 rows or more
    │   ├── TruncatedTensor         fewer bytes than the header promises
    │   ├── TrailingBytes           more bytes than the header promises
    │   ├── NotFinite               NaN or infinity among the values
    │   ├── UnsafePickle            a pickle that asks for anything but tensors
    │   ├── SeveralSoftPrompts      more than one in a file, and none named
    │   ├── UnsupportedMethod       a module or adapter that holds no rows: LoRA, prefix tuning, NovelAI's
    │   ├── NotWritable             a format that is only read, or that cannot hold this soft prompt
    │   ├── UnknownScale            rows in the other scale than the format's, and no model to convert them by
    │   ├── MetadataTooLarge        metadata past its limit
    │   ├── MetadataNotUTF8         meta.json in another encoding
    │   └── MetadataNotJSON         meta.json that does not parse
    ├── CompatibilityError          a soft prompt and a model that do not go together
    │   ├── WidthMismatch           another number of columns than the model's embedding
    │   └── ContextExceeded         soft tokens, text and new tokens do not fit the context
    ├── ModelError                  a model that soft tokens cannot be given to
    │   ├── NoEmbedding             no input embedding that takes token ids
    │   ├── UnsupportedModel        a kind of model that soft tokens are not made for
    │   └── UnsupportedCall         a way of calling the model that soft tokens cannot follow
    ├── EngineError                 an engine outside this process that did not do what it was asked
    │   ├── EngineUnreachable       no answer from it
    │   ├── EngineRefused           an answer that says no, or makes no sense
    │   └── WrongModel              it has another model loaded than the soft prompt was exported for
    ├── EditError                   metadata that cannot be changed where they are, or soft prompts that do not combine
    │   └── NameTaken               another file has that name
    ├── SelectionError              a choice from the menu that cannot be carried out
    │   ├── NoModel                 nothing is loaded that could use a soft prompt
    │   └── UnknownSoftPrompt       no such file in the folder
    ├── HostError                   a host application that is not the one a hook knows
    │   ├── UnknownHost             a folder that is none of the host applications that we can be installed into
    │   ├── NoEnvironment           a host whose Python environment cannot be found, told apart or used
    │   ├── ForeignPackage          an environment with another release of ours, which somebody else put there
    │   ├── FileInTheWay            a file that is not ours, or no longer, where one of ours has to go
    │   ├── ReadOnlyInstall         a folder that an install cannot write to
    │   └── BadRecord               a record of an install that cannot be read
    └── TrainingError               a training that cannot begin or go on
        ├── BadSetting              a setting with a value that cannot be
        ├── NoData                  nothing to learn from
        ├── DataNotUnderstood       a file of data that is not in a form that is known
        ├── NotEnoughMemory         no batch, not even of one text, fits
        ├── CheckpointMismatch      a checkpoint of another training
        ├── AlreadyRunning          another process trains in the same folder
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
    """A file of no known format."""


class NoTensor(FormatError):
    """A zip, a folder or a file without the tensor that its format has."""


class EncryptedMember(FormatError):
    """A zip member that needs a password."""


class UnsupportedCompression(FormatError):
    """A zip member that is not stored, deflated or LZMA-compressed."""


class CorruptMember(FormatError):
    """A part of a file, such as a zip member, that cannot be unpacked or whose checksum is wrong."""


class DuplicateMember(FormatError):
    """Two zip members of one name: readers disagree on which one counts."""


class UnsafeName(FormatError):
    """A member or file name that leaves its folder: absolute, or with ``..``."""


class TooLarge(FormatError):
    """More bytes than allowed: declared, unpacked, or as the dictionary of an LZMA stream."""


class BadTensorHeader(FormatError):
    """Bytes that are not a tensor's header, or one that contradicts itself."""


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


class UnsafePickle(FormatError):
    """A pickle that asks for anything but tensors; nothing of it was executed."""


class SeveralSoftPrompts(FormatError):
    """More than one soft prompt in a file, and none of them named."""


class UnsupportedMethod(FormatError):
    """A module or adapter that holds no rows: LoRA, prefix tuning, NovelAI's modules."""


class NotWritable(FormatError):
    """A format that is only read, or that cannot hold this soft prompt."""


class UnknownScale(FormatError):
    """Rows in the other scale than the format's, and no model is named to convert them by."""


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
    """A kind of model that soft tokens are not made for, or that an engine cannot use."""


class UnsupportedCall(ModelError):
    """A way of calling the model that soft tokens cannot follow, such as ``inputs_embeds``."""


class EngineError(SoftPromptError):
    """An engine outside this process that did not do what it was asked; the session goes on."""


class EngineUnreachable(EngineError):
    """An engine that does not answer: it is down, or was ended within an answer."""


class EngineRefused(EngineError):
    """An engine that answers that it will not, or in a way that makes no sense."""


class WrongModel(EngineError):
    """An engine with another model than the one that is meant."""


class EditError(SoftPromptError):
    """Metadata that cannot be changed where they are, or soft prompts that cannot be combined into one."""


class NameTaken(EditError):
    """A file name that another file in the folder has."""


class SelectionError(SoftPromptError):
    """A choice from the menu that cannot be carried out; the selection stays what it was."""


class NoModel(SelectionError):
    """Nothing is loaded that could use a soft prompt."""


class UnknownSoftPrompt(SelectionError):
    """There is no such file in the softprompts folder."""


class HostError(SoftPromptError):
    """A host application that is not the one a hook knows; nothing was changed."""


class UnknownHost(HostError):
    """A folder that is none of the host applications that we can be installed into."""


class NoEnvironment(HostError):
    """A host whose Python environment cannot be found, told apart from others, or used."""


class ForeignPackage(HostError):
    """An environment with another release of ``kobold_sp_plugin``, which this host's install did not put there."""


class FileInTheWay(HostError):
    """A file that is not ours, or was changed after it was installed, where one of ours has to go."""


class ReadOnlyInstall(HostError):
    """A folder that an install cannot write to, or could not finish writing to; what was written is gone again."""


class BadRecord(HostError):
    """A record of an install that cannot be read, so that nothing can be upgraded or taken back by it."""


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


class AlreadyRunning(TrainingError):
    """Another process trains in the same folder."""


class Diverged(TrainingError):
    """A loss that is no number any more."""
