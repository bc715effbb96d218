"""What one trunk lets its tenants use."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Limits:
    """Bounds on what is held and accepted, the same for every tenant."""

    max_tokens_per_request: int = 65_536
    """Batch rows times tokens of one forward."""
    max_adapter_rank: int = 256
    max_adapter_parameters: int = 100_000_000
    max_adapters_per_session: int = 8
    peft_methods: tuple[str, ...] = ()
    """PEFT methods that tenants may use; empty for all that the trunk can build."""
    serve_weights: bool = False
    """Whether tenants may read base matrices of the blocks."""
    check_finite: bool = False
    """Whether hidden states and gradients with NaN or Inf are refused."""
    held_bytes: int = 4 * GIB
    """Autograd state and caches of all sessions."""
    session_held_bytes: int = 2 * GIB
    """Autograd state and caches of one session."""
    max_sessions: int = 256
    tenant_held_bytes: int = 3 * GIB
    """Autograd state and caches of all sessions of one tenant."""
    tenant_max_sessions: int = 64
    tenant_adapter_parameters: int = 200_000_000
    """Trainable numbers of all adapters of one tenant."""
    tenant_requests_in_flight: int = 64
    """Of all sessions of one tenant."""
    tenant_pushes_per_minute: float = 6000.0
    """Changed adapters that all sessions of one tenant send, in bursts of up to a minute's."""
    max_requests_in_flight: int = 32
    """Of one session; more wait on the wire."""
    held_lease_s: float = 600.0
    """How long state waits for its backward."""
    session_lease_s: float = 3600.0
    """How long a session may be silent."""
    resume_window_s: float = 60.0
    """How long a session whose connection broke waits for its client."""
    return_memory_after_s: float = 30.0
    """How long nothing was computed when freed memory goes back to the system."""
