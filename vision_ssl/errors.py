"""The errors that users meet: each is one line that names the argument, what was given and what was expected."""


class VisionSSLError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class DataError(VisionSSLError, ValueError):
    """A source cannot be read, or does not hold what was asked of it."""


class RecipeError(VisionSSLError):
    """A hyper-parameter, or a combination of them, cannot work.

    This is no ValueError, which the command line's parser would catch and print in its own words.
    """


class WeightsError(VisionSSLError, ValueError):
    """Weights are unknown, out of reach, damaged, or not those that the registry, their card or the Hub vouches for."""


class CheckpointError(VisionSSLError, RuntimeError):
    """A checkpoint cannot be written, read or continued."""


class TrainingError(VisionSSLError, RuntimeError):
    """Training cannot go on."""


class MissingExtraError(VisionSSLError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed: pip install "vision-ssl[{extra}]"')
