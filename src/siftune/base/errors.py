"""The exceptions that siftune raises on purpose.

    SiftuneError                exit code 1: ours
    └── InputError              exit code 2: the user's input
        ├── RecipeError         a recipe, a YAML key or a flag
        ├── DataError           a file or row of training or evaluation data
        ├── ModelError          a model folder, hub id or download
        ├── LayerError          a model whose decoder layers cannot be found
        ├── AdapterError        adapters that are missing or of a kind that a method cannot use
        ├── KitError            a kit or a return that is damaged, forged, or does not fit
        ├── UnsupportedError    a combination that a method refuses
        └── TrainingError       training that cannot continue: a loss of NaN, a full disk

Every message says what was found, where, and what to do.
"""


class SiftuneError(Exception):
    """Base of every exception that siftune raises on purpose.

    Example:
        >>> from siftune import IST, SiftuneError
        >>> try:
        ...     IST(active=2)
        ... except SiftuneError as error:
        ...     print(error)
        ist.active is 2, but must be a number, above 0 and at most 1
    """

    exit_code = 1


class InputError(SiftuneError):
    """Something that the user gave or set up cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, a YAML key or a command-line flag is wrong."""


class DataError(InputError):
    """A data file or a row of it is wrong."""


class ModelError(InputError):
    """A model cannot be found, fetched or loaded."""


class LayerError(InputError):
    """The decoder layers of a model cannot be found."""


class AdapterError(InputError):
    """Adapters are missing, or of a kind that the method cannot use."""


class KitError(InputError):
    """A kit or a return is damaged, forged, or does not fit; the message names file and field."""


class UnsupportedError(InputError):
    """The method refuses this combination."""


class TrainingError(InputError):
    """Training cannot continue; saved files stay intact."""
