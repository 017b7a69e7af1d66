"""Errors a user can mend. The text is one line: what was expected, what came, what to do.

The command line exits with 2 on them, except where it says otherwise.
"""


class SpecMPCError(Exception):
    """Base of every error whose remedy is the user's."""


class ConfigError(SpecMPCError):
    """An option, preset or setting that does not fit."""


class UnknownTask(SpecMPCError):
    """A task name outside the registry."""


class SuiteNotInstalled(SpecMPCError):
    """A task whose suite, or its assets, is not on this machine."""


class AssetsMissing(SuiteNotInstalled):
    """A task whose suite is installed and whose assets have not been downloaded."""


class SimulationDiverged(SpecMPCError):
    """A simulator whose state is no longer finite."""


class CheckpointError(SpecMPCError):
    """A teacher or corrector file that is missing, foreign, damaged or does not fit."""


class DatasetError(SpecMPCError):
    """A dataset that is missing, foreign, damaged or of another teacher."""


class CalibrationFailed(SpecMPCError):
    """No gate keeps the promise about return that was asked for."""


class ActionNotFinite(SpecMPCError):
    """An actor whose action is not a number: its weights are damaged or diverged."""


class TrainingDiverged(SpecMPCError):
    """Losses, gradients or actions of a training that are not finite."""


class CannotRender(SpecMPCError):
    """A task that this machine cannot draw."""


class StoreError(SpecMPCError):
    """The store cannot be read or written."""


class Interrupted(SpecMPCError):
    """Ctrl-C in work that can be continued; says how (exit code 130)."""


class GateFailed(SpecMPCError):
    """A `--require` that no row of a comparison meets (exit code 3)."""
