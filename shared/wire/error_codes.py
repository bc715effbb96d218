"""Wire error codes and exceptions, one table both ways."""

from __future__ import annotations

from shared import errors
from shared.pb.trunkline.v1 import trunk_pb2 as pb

_TABLE: dict[int, type[errors.TrunklineError]] = {
    pb.ERROR_CODE_PROTOCOL: errors.ProtocolError,
    pb.ERROR_CODE_TENSOR: errors.TensorError,
    pb.ERROR_CODE_ADAPTER: errors.AdapterError,
    pb.ERROR_CODE_MODEL_MISMATCH: errors.ModelMismatchError,
    pb.ERROR_CODE_UNKNOWN_REQUEST: errors.UnknownRequestError,
    pb.ERROR_CODE_REUSED_REQUEST: errors.ReusedRequestError,
    pb.ERROR_CODE_RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    pb.ERROR_CODE_DRAINING: errors.DrainingError,
    pb.ERROR_CODE_SESSION_EXPIRED: errors.SessionExpiredError,
    pb.ERROR_CODE_UNAUTHENTICATED: errors.AuthenticationError,
    pb.ERROR_CODE_UNKNOWN_SESSION: errors.UnknownSessionError,
    pb.ERROR_CODE_STALE_SESSION: errors.StaleSessionError,
    pb.ERROR_CODE_STALE_STATE: errors.StaleStateError,
    pb.ERROR_CODE_SHARED_WEIGHTS: errors.SharedWeightsError,
    pb.ERROR_CODE_INTERNAL: errors.TrunkInternalError,
}

MAX_MESSAGE_CHARS = 2000
"""Of an error's text: what was given may be of any length, and is repeated in it."""

_CODES = {error: code for code, error in _TABLE.items()}


def to_message(error: errors.TrunklineError) -> pb.Error:
    """Describes an error for the other side; one of no listed class becomes INTERNAL."""
    code = next((_CODES[c] for c in type(error).__mro__ if c in _CODES), pb.ERROR_CODE_INTERNAL)
    retry_after_s = getattr(error, "retry_after_s", 0.0)
    return pb.Error(
        code=pb.ErrorCode.ValueType(code), message=short(error), retry_after_s=retry_after_s
    )


def short(error: Exception) -> str:
    """An error's text, cut where it is longer than anybody reads."""
    text = str(error)
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    return f"{text[:MAX_MESSAGE_CHARS]}… ({len(text)} characters)"


def to_exception(message: pb.Error) -> errors.TrunklineError:
    """Returns the exception that an error message stands for."""
    error_class = _TABLE.get(message.code, errors.TrunkInternalError)
    if error_class is errors.ResourceExhaustedError:
        return errors.ResourceExhaustedError(message.message, message.retry_after_s)
    return error_class(message.message)
