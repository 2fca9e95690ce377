"""Every error that coldstart raises, by condition.

::

    ColdstartError
    +-- UsageError                the caller's code or command is wrong: fix it, retrying cannot help
    |   +-- ConfigError           a setting has a value that cannot be used
    |   +-- HandlerError          a handler file, or the arguments of @coldstart
    |   +-- UndeclaredNameError   ctx.env / ctx.secret asked for a name that the decorator does not declare
    |   +-- KeyUncomputableError  what the snapshot depends on cannot be seen in the source
    |   +-- EventError            the event is not a mapping with an input
    |   +-- ProgramCallError      a call outside what a program was made for: dtype, shape, range, structure
    +-- StoreError                the snapshot store
    |   +-- ObjectMissingError    nothing is stored under that key
    |   +-- ConditionFailedError  a conditional write lost (the object exists, or changed meanwhile)
    |   +-- AccessDeniedError     wrong or expired credentials, or no permission
    |   +-- StoreSetupError       the store itself is unusable: scheme, bucket, folder, missing package
    |   +-- StoreTransientError   may go through if asked again: the only class that is ever retried
    |   +-- PublishUnknownError   whether a generation became current could not be found out
    +-- SnapshotError             stored data cannot be used
    |   +-- ManifestError         a ref or manifest is malformed, or breaks a limit
    |   |   +-- FormatVersionError  written by a newer coldstart
    |   +-- BlobCorruptError      stored bytes are not what the manifest says
    |   +-- StateMismatchError    build() and the captured state disagree
    |   +-- CollectionRefusedError  a live snapshot cannot be read, so nothing may be collected
    |   +-- UntrustedError        code (a program, a kernel cache) from a store that is not trusted
    |   +-- ProgramError          a program's record is malformed, or its runtime refused it
    |       +-- ProgramRuntimeError  the runtime of a program is missing, or too old
    +-- CaptureError              a snapshot could not be made; never fails a request
    |   +-- UncapturableError     the state holds something that cannot be stored, named by its path
    |   +-- StateChangedError     bytes changed while, or before, they were copied
    |   +-- ExportError           an entry point could not be made into a program
    |   +-- ProofError            a fresh process did not answer like the first worker
    +-- StartError                a worker could not start
    |   +-- PhaseError            one phase of the start failed; names it
    |   +-- ForkError             the process forked before the worker was ready
    |   +-- RecoveryError         a snapshot cannot be used, and the recovery mode allows no further step
    +-- DeviceError               a device is missing, or has no memory
    +-- CodecError                a frame is malformed, or a codec is unknown or not installed
    +-- DeployError               a platform's management API, or what it deploys
        +-- CredentialsError      no API key, or the platform refused it
        +-- ResourceMissingError  the platform has nothing of that id or name
        +-- ConflictError         what is there stands against what was asked for
        +-- RequestInvalidError   the platform refused the request's content
        +-- PlatformBusyError     the platform was busy, or could not be reached
        +-- ImageError            the image could not be built or pushed

A message says what happened, to what, and what to do. Programming errors inside coldstart are not in this tree.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class ColdstartError(Exception):
    """Base of all errors of coldstart.

    ``snapshot`` (a snapshot's name), ``key`` (an object's key in the store) and ``phase`` are set where they are known.
    """

    def __init__(
        self, message: str, *, snapshot: str | None = None, key: str | None = None, phase: str | None = None
    ) -> None:
        super().__init__(message)
        self.snapshot = snapshot
        self.key = key
        self.phase = phase


class UsageError(ColdstartError):
    """The caller's code or command is wrong."""


class ConfigError(UsageError):
    """A setting has a value that cannot be used."""


class HandlerError(UsageError):
    """A handler file, or the arguments of the decorator, cannot be used."""


class UndeclaredNameError(UsageError):
    """``ctx.env`` or ``ctx.secret`` was asked for a name that the decorator does not declare."""


class KeyUncomputableError(UsageError):
    """What a snapshot depends on cannot be seen in the source; ``version=`` is the remedy."""


class EventError(UsageError):
    """The event is not a mapping with an ``input``."""


class ProgramCallError(UsageError):
    """A call that a program was not made for: the message names the argument, what it was and what is allowed."""


class StoreError(ColdstartError):
    """The snapshot store failed."""


class ObjectMissingError(StoreError):
    """Nothing is stored under the key."""


class ConditionFailedError(StoreError):
    """A conditional write lost: the object exists already, or is not the one that was read."""


class AccessDeniedError(StoreError):
    """The store refused the credentials, or they lack a permission."""


class StoreSetupError(StoreError):
    """The store cannot be used at all: unknown scheme, missing bucket or package, unwritable folder."""


class StoreTransientError(StoreError):
    """The operation failed in a way that may pass; the retrying wrapper repeats these and no others."""


class PublishUnknownError(StoreError):
    """The answer to the swap of a ref was lost and reading it back failed: the generation may be current, or not."""


class SnapshotError(ColdstartError):
    """Stored data cannot be used."""


class ManifestError(SnapshotError):
    """A ref or a manifest is malformed or breaks a limit of the format."""


class FormatVersionError(ManifestError):
    """A ref or a manifest was written by a newer major version of the format."""


class BlobCorruptError(SnapshotError):
    """Stored bytes are not what the manifest says they are."""


class StateMismatchError(SnapshotError):
    """``build`` made a skeleton that differs from the captured state; ``differences`` lists how."""

    def __init__(self, message: str, *, differences: "Sequence[str]" = (), snapshot: str | None = None) -> None:
        super().__init__(message, snapshot=snapshot)
        self.differences = tuple(differences)


class CollectionRefusedError(SnapshotError):
    """A ref or a live manifest cannot be read: what it names is not known, so nothing at all is deleted."""


class UntrustedError(SnapshotError):
    """The snapshot carries code and comes from a store that is not trusted."""


class ProgramError(SnapshotError):
    """A program cannot be used: its record is malformed, or its runtime refused it."""


class ProgramRuntimeError(ProgramError):
    """The runtime that a program needs is missing here, or too old."""


class CaptureError(ColdstartError):
    """A snapshot could not be made. Never reaches a request."""


class UncapturableError(CaptureError):
    """The state holds something that cannot be stored; ``path`` says where."""

    def __init__(self, message: str, *, path: str, snapshot: str | None = None) -> None:
        super().__init__(message, snapshot=snapshot)
        self.path = path


class StateChangedError(CaptureError):
    """Bytes of the state changed before or while they were copied, so the copy was dropped."""


class ExportError(CaptureError):
    """An entry point could not be made into a program; starts go on without one."""


class ProofError(CaptureError):
    """A fresh process, started from the new generation, did not answer like the worker that made it."""


class StartError(ColdstartError):
    """The worker could not start."""


class PhaseError(StartError):
    """One phase of the start failed; ``phase`` names it and ``__cause__`` is the user's own error."""


class ForkError(StartError):
    """The process forked while the worker was starting."""


class RecoveryError(StartError):
    """A snapshot cannot be used, or there is none, and the recovery mode allows no further step."""


class DeviceError(ColdstartError):
    """A device is missing, or cannot give the memory asked for."""


class CodecError(ColdstartError):
    """A frame is malformed, or its codec is unknown or not installed."""


class DeployError(ColdstartError):
    """Deploying failed; ``status`` is the HTTP status that the platform answered, 0 where there was no answer."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CredentialsError(DeployError):
    """There is no API key, or the platform refused it."""


class ResourceMissingError(DeployError):
    """The platform has nothing of that id or name."""


class ConflictError(DeployError):
    """What the platform has stands against what was asked for."""


class RequestInvalidError(DeployError):
    """The platform refused the content of a request; the message shows what it said."""


class PlatformBusyError(DeployError):
    """The platform was busy, failed, or could not be reached; the same command may go through later."""


class ImageError(DeployError):
    """The image could not be built or pushed."""
