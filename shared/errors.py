"""The errors of both services, as one tree.

::

    TrunklineError
    ├── InvalidInputError (ValueError)      what was given cannot be used; nothing was changed
    │   ├── SplitError                      the split does not fit the model
    │   ├── CheckpointError                 a model folder or file is missing, damaged or foreign
    │   ├── QuantizationError               a quantisation that is unknown or not installed
    │   ├── AdapterError                    a PEFT configuration, method or weight is unusable
    │   ├── DataError                       a training file is missing, empty or not text
    │   ├── TensorError                     shape, dtype, size or values of a tensor
    │   └── ProtocolError                   a message out of order or malformed
    ├── RequestStateError (RuntimeError)    the request does not fit the session's state
    │   ├── UnknownRequestError
    │   ├── ReusedRequestError
    │   └── StaleStateError                 the trunk has another state of the client's adapters
    ├── SharedWeightsError (RuntimeError)   the trunk's base weights would be written or read
    ├── AuthenticationError (PermissionError)   no certificate or token that is accepted
    ├── ModelMismatchError (RuntimeError)   client and trunk hold different models
    ├── ResourceExhaustedError (RuntimeError)   a budget is spent; try again later
    ├── TrunkUnavailableError (ConnectionError) no trunk there, or the connection broke
    │   ├── DrainingError
    │   ├── SessionExpiredError
    │   ├── UnknownSessionError             no such session of this tenant
    │   └── StaleSessionError               another connection has taken the session over
    └── TrunkInternalError (RuntimeError)   the trunk failed; its log has the details
"""


class TrunklineError(Exception):
    """Root of every error this project raises on purpose."""


class InvalidInputError(TrunklineError, ValueError):
    """What was given cannot be used; nothing was changed."""


class SplitError(InvalidInputError):
    """A split that does not fit the model."""


class CheckpointError(InvalidInputError):
    """A model folder or file that is missing, damaged or of another family."""


class QuantizationError(InvalidInputError):
    """A quantisation that does not exist, is not installed, or was done before."""


class AdapterError(InvalidInputError):
    """A PEFT configuration, method or weight that cannot be used here."""


class DataError(InvalidInputError):
    """A training file that is missing, empty or not text."""


class TensorError(InvalidInputError):
    """A tensor whose shape, dtype, size or values are not acceptable."""


class ProtocolError(InvalidInputError):
    """A message that is malformed or out of protocol order."""


class RequestStateError(TrunklineError, RuntimeError):
    """A request that does not fit the state of its session."""


class UnknownRequestError(RequestStateError):
    """No state is held under this request id: never sent, already used, released or expired."""


class ReusedRequestError(RequestStateError):
    """Another forward is held under the request id."""


class StaleStateError(RequestStateError):
    """The trunk has another state of the client's adapters than the request means."""


class SharedWeightsError(TrunklineError, RuntimeError):
    """Base weights of the trunk's blocks cannot be written, and only read if the host allows it."""


class AuthenticationError(TrunklineError, PermissionError):
    """No certificate or token, or one that is not accepted (any more)."""


class ModelMismatchError(TrunklineError, RuntimeError):
    """The trunk serves another model, split or weights than the client holds."""


class ResourceExhaustedError(TrunklineError, RuntimeError):
    """A byte budget or a queue is full.

    Attributes:
        retry_after_s: Seconds after which a retry may succeed.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TrunkUnavailableError(TrunklineError, ConnectionError):
    """No trunk answers at the address, or the connection to it broke."""


class DrainingError(TrunkUnavailableError):
    """The trunk is shutting down and takes no new work."""


class SessionExpiredError(TrunkUnavailableError):
    """The session sat idle longer than its lease and was freed."""


class UnknownSessionError(TrunkUnavailableError):
    """The trunk has no such session of this tenant: never opened, freed, or somebody else's."""


class StaleSessionError(TrunkUnavailableError):
    """Another connection has taken the session over; this one may not change it any more."""


class TrunkInternalError(TrunklineError, RuntimeError):
    """The trunk failed unexpectedly; its log has the details under the request id."""
