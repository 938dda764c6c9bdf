"""The one error tree. Every error that a user can meet is a `SymbiosisError`.

    SymbiosisError
    ├── ConfigurationError         the user's settings; fix them and run again
    │   ├── UnknownBaseError       no model at that path or hub id
    │   ├── MissingCorpusError     no text where the corpus should be
    │   ├── UnsupportedError       a mode, transport or option that this version does not have
    │   └── MissingExtraError      a package that only an extra of this distribution installs
    ├── ProtocolError              one side sent what the protocol does not allow; a repeat fails alike
    │   ├── FrameError             truncated, oversized or malformed bytes
    │   ├── UnknownLayerError      a layer that the manifest does not list
    │   ├── ShapeError             rows whose width or count the layer does not take
    │   ├── DtypeError             a dtype that the wire does not carry
    │   ├── NonFiniteError         NaN or infinite rows
    │   ├── FieldError             numbers that are no field elements, or a pad that cannot be drawn
    │   └── VersionError           the two sides speak different protocol versions
    ├── IdentityError              who is speaking is not settled; never retried
    │   ├── CertificateError       missing, expired, foreign or malformed certificate or key
    │   └── EnrolmentError         a certificate request that cannot be granted
    ├── PolicyError                the host does not publish, or not to this tenant
    ├── PrivacyBudgetError         another step would spend more ε than was allowed
    ├── CustodyError               the egress gate refused to let something leave
    ├── PrivacyError               rows cannot be hidden as promised any more; none left
    ├── LedgerError                the ledger cannot be written, or does not verify
    ├── TranscriptError            a recording cannot be written or read
    ├── ReportError                an audit's report cannot be written or read, or its signature does not hold
    ├── HostUnavailableError       the host did not answer; the same call may be sent again
    ├── OverloadedError            the host has as much of this tenant's work as it takes; later it takes more
    ├── HostFailureError           the host answered with a failure of its own
    ├── IntegrityError             host or helper answered wrongly, as a check of the answer found
    ├── RemoteWeightError          an operation that a weight living elsewhere cannot take part in
    ├── TaskError                  a Flower task that its worker could not finish
    ├── SimulationError            a simulated run that did not complete
    └── BenchmarkError             a measurement that did not complete, or whose sides did not do the same work

An error carries what was wrong and what to do next, has a stable `code`, and survives pickling (Flower's
simulation moves errors between processes). Codes also travel: `protocols.status` maps them to the wire.
"""

from __future__ import annotations

from typing import ClassVar


class SymbiosisError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was wrong, one sentence, without a trailing full stop.
        next_action: what the reader can do about it, likewise; empty when nothing can be done.
    """

    code: ClassVar[str] = "symbiosis"

    def __init__(self, message: str, next_action: str = "") -> None:
        super().__init__(message, next_action)
        self.message = message
        self.next_action = next_action

    def __str__(self) -> str:
        parts = (self.message, self.next_action)
        return " ".join(part.rstrip(".") + "." for part in parts if part)


class ConfigurationError(SymbiosisError):
    """The user's settings are wrong; a retry without changing them fails alike."""

    code = "configuration"


class UnknownBaseError(ConfigurationError):
    """No base model can be loaded from the given path or hub id."""

    code = "unknown-base"


class MissingCorpusError(ConfigurationError):
    """A corpus has no text."""

    code = "missing-corpus"


class UnsupportedError(ConfigurationError):
    """A privacy mode, transport or option that this version does not have."""

    code = "unsupported"


class MissingExtraError(ConfigurationError):
    """What was asked for needs a package that only an extra of this distribution installs."""

    code = "missing-extra"


class ProtocolError(SymbiosisError):
    """One side sent what the protocol does not allow; a retry of the same bytes fails alike."""

    code = "protocol"


class FrameError(ProtocolError):
    """Bytes that are truncated, oversized or not a frame."""

    code = "frame"


class UnknownLayerError(ProtocolError):
    """A layer that the manifest does not list."""

    code = "unknown-layer"


class ShapeError(ProtocolError):
    """Rows whose width or count the layer does not take."""

    code = "shape"


class DtypeError(ProtocolError):
    """A dtype that the wire does not carry."""

    code = "dtype"


class NonFiniteError(ProtocolError):
    """Rows that hold NaN or an infinity; they are refused before they can meet another tenant's rows."""

    code = "non-finite"


class FieldError(ProtocolError):
    """Rows of field elements that hold another number, or a pad that cannot be drawn from what was given."""

    code = "field"


class VersionError(ProtocolError):
    """The two sides speak different protocol versions."""

    code = "version"


class IdentityError(SymbiosisError):
    """Who is speaking is not settled. Never retried: a handshake refused once is refused again."""

    code = "identity"


class CertificateError(IdentityError):
    """A certificate or key is missing, expired, malformed or signed by somebody else."""

    code = "certificate"


class EnrolmentError(IdentityError):
    """A certificate signing request that cannot be granted."""

    code = "enrolment"


class PolicyError(SymbiosisError):
    """The host's publishing policy does not allow what was asked for."""

    code = "policy"


class PrivacyBudgetError(SymbiosisError):
    """Another step of differentially private training would spend more than was allowed; it was not made."""

    code = "privacy-budget"


class CustodyError(SymbiosisError):
    """The egress gate refused to let something leave the tenant; nothing was sent."""

    code = "custody"


class PrivacyError(SymbiosisError):
    """A mechanism cannot keep its promise for these rows; they did not leave."""

    code = "privacy"


class LedgerError(SymbiosisError):
    """The ledger cannot be written (sending stops) or its chain does not verify."""

    code = "ledger"


class TranscriptError(SymbiosisError):
    """A recording cannot be written or read."""

    code = "transcript"


class ReportError(SymbiosisError):
    """An audit's report cannot be written or read, or its signature or a digest in it does not hold."""

    code = "report"


class HostUnavailableError(SymbiosisError):
    """The host did not answer. A call is a pure function: sending it again is safe."""

    code = "host-unavailable"


class OverloadedError(SymbiosisError):
    """The host has as much work under way as it takes. The same message may be sent again after a while.

    Args:
        message: as `SymbiosisError`.
        next_action: as `SymbiosisError`.
        retry_after_s: when there is probably room for it (seconds from now).
    """

    code = "overloaded"

    def __init__(self, message: str, next_action: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(message, next_action)
        self.retry_after_s = retry_after_s


class HostFailureError(SymbiosisError):
    """The host answered with a failure of its own; the details stay in the host's log."""

    code = "host-failure"


class IntegrityError(SymbiosisError):
    """A check found that an answer is not the product that was asked for. Never retried: nothing more is sent."""

    code = "integrity"


class RemoteWeightError(SymbiosisError):
    """An operation that needs the numbers of a weight that lives at the host."""

    code = "remote-weight"


class TaskError(SymbiosisError):
    """A Flower task that its worker could not finish."""

    code = "task"


class SimulationError(SymbiosisError):
    """A simulated run did not complete."""

    code = "simulation"


class BenchmarkError(SymbiosisError):
    """A measurement did not complete, or its two sides did not do the same work."""

    code = "benchmark"
