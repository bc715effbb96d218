"""Settings of the trunk daemon: flags, then environment (``TRUNKD_…``), then a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from peft import PeftType
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shared.errors import InvalidInputError
from shared.models import SplitRange
from shared.models.quantization import check_kind
from trunk_service.limits import Limits

_LIMITS = Limits()
# As gRPC takes it: the scheme and the port may be left out.
_COLLECTOR = re.compile(r"unix:\S+|(https?://)?(\[[^\s\]]+\]|[^\s/:\[\]]+)(:[0-9]{1,5})?/?")
_MOST_THREADS = 1024
_MOST = 2**31 - 1
"""Of what is counted."""
_MOST_IN_ALL = 2**63 - 1
_LONGEST_S = 1e9
"""Longer than any trunk lives."""


class TrunkSettings(BaseSettings):
    """Serve the middle blocks of a language model to clients that hold its two ends."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="TRUNKD_",
        cli_prog_name="trunkd",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    model: str = ""
    """Folder (whole or split layout) or hub id; without it, the bundled model."""
    split: str = "2:10"
    """Blocks START:END that live here: START .. END - 1."""
    listen: str = "127.0.0.1:50052"
    """HOST:PORT to serve on; port 0 takes a free one."""
    tls: Path | None = None
    """Folder of ca.pem, cert.pem and key.pem: TLS, only with clients that this CA certified."""
    tokens: Path | None = None
    """File of lines TENANT TOKEN [EXPIRY]: asks for a token too; needs --tls."""
    insecure: bool = False
    """Turn TLS, client certificates and tokens off, whatever is set; on loopback only."""
    device: str = "cpu"
    """Torch device to compute on."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What base weights are held and computed in."""
    quantize: Literal["", "nf4", "int8"] = ""
    """Hold base weights in NF4 or int8 (bitsandbytes, `pip install trunkline[quant]`)."""
    onednn: bool = False
    """Let oneDNN compute float32 linear layers: faster on AMD CPUs, the same up to rounding."""
    workers: int = Field(default=1, ge=1, le=_MOST_THREADS)
    """Compute threads; sessions beyond their number take turns."""
    threads: int = Field(default=0, ge=0, le=_MOST_THREADS)
    """Threads torch uses inside one request; 0 takes all cores, shared among the workers."""
    adaptive: bool = False
    """Vary threads with the load: faster for many tenants, no longer bitwise reproducible."""
    batch_decoding: int = Field(default=0, ge=0, le=_MOST)
    """Most rows of all sessions that generate computed as one batch; 0 computes each alone."""
    ready_file: Path | None = None
    """Receives JSON with the address once the daemon serves."""
    metrics: str = ""
    """HOST:PORT to serve Prometheus metrics on; empty serves none."""
    otlp_endpoint: str = ""
    """Where to send OpenTelemetry spans (`pip install trunkline[otel]`); empty sends none."""
    reflection: bool = False
    """Serve gRPC reflection."""
    drain_timeout_s: float = Field(default=30.0, ge=0, le=_LONGEST_S)
    """How long SIGTERM waits for open backwards."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log records written."""
    max_tokens_per_request: int = Field(
        default=_LIMITS.max_tokens_per_request, ge=1, le=_MOST_IN_ALL
    )
    """Most batch rows times tokens in one forward."""
    max_adapter_rank: int = Field(default=_LIMITS.max_adapter_rank, ge=1, le=_MOST)
    """Largest adapter rank a tenant may ask for."""
    max_adapter_parameters: int = Field(
        default=_LIMITS.max_adapter_parameters, ge=1, le=_MOST_IN_ALL
    )
    """Most trainable numbers of one tenant."""
    max_adapters_per_session: int = Field(default=_LIMITS.max_adapters_per_session, ge=1, le=_MOST)
    """Most adapters of one session."""
    peft_methods: tuple[str, ...] = _LIMITS.peft_methods
    """PEFT methods that tenants may use, as PEFT writes them; without it, all."""
    serve_weights: bool = _LIMITS.serve_weights
    """Let tenants read base matrices of the blocks, as copies for modules_to_save need."""
    check_finite: bool = _LIMITS.check_finite
    """Refuse hidden states and gradients with NaN or Inf; loss scaling needs them to pass."""
    held_bytes: int = Field(default=_LIMITS.held_bytes, ge=1, le=_MOST_IN_ALL)
    """Autograd state and caches of all sessions."""
    session_held_bytes: int = Field(default=_LIMITS.session_held_bytes, ge=1, le=_MOST_IN_ALL)
    """Autograd state and caches of one session."""
    offload_bytes: int = Field(default=0, ge=0, le=_MOST_IN_ALL)
    """Autograd state kept elsewhere when it does not fit: in --offload-dir, or pinned memory."""
    offload_dir: Path | None = None
    """Folder for nameless files of offloaded state; needed on a CPU."""
    max_sessions: int = Field(default=_LIMITS.max_sessions, ge=1, le=_MOST)
    """Most sessions at once."""
    tenant_held_bytes: int = Field(default=_LIMITS.tenant_held_bytes, ge=1, le=_MOST_IN_ALL)
    """Autograd state and caches of all sessions of one tenant."""
    tenant_max_sessions: int = Field(default=_LIMITS.tenant_max_sessions, ge=1, le=_MOST)
    """Most sessions of one tenant at once."""
    tenant_adapter_parameters: int = Field(
        default=_LIMITS.tenant_adapter_parameters, ge=1, le=_MOST_IN_ALL
    )
    """Most trainable numbers of all adapters of one tenant."""
    tenant_requests_in_flight: int = Field(
        default=_LIMITS.tenant_requests_in_flight, ge=1, le=_MOST
    )
    """Most requests of one tenant under way."""
    tenant_pushes_per_minute: float = Field(
        default=_LIMITS.tenant_pushes_per_minute, gt=0, le=_MOST
    )
    """Most changed adapters that one tenant sends, in bursts of up to a minute's."""
    max_requests_in_flight: int = Field(default=_LIMITS.max_requests_in_flight, ge=1, le=_MOST)
    """Most requests of one session under way; more wait on the wire."""
    held_lease_s: float = Field(default=_LIMITS.held_lease_s, gt=0, le=_LONGEST_S)
    """Seconds until a forward without a backward is freed."""
    session_lease_s: float = Field(default=_LIMITS.session_lease_s, gt=0, le=_LONGEST_S)
    """Seconds until a silent session is freed."""
    resume_window_s: float = Field(default=_LIMITS.resume_window_s, gt=0, le=_LONGEST_S)
    """Seconds that a session whose connection broke waits for its client."""
    return_memory_after_s: float = Field(default=_LIMITS.return_memory_after_s, gt=0, le=_LONGEST_S)
    """Seconds without work until freed memory goes back to the system."""

    @field_validator("listen", "metrics")
    @classmethod
    def _host_and_port(cls, value: str, field: ValidationInfo) -> str:
        if not value and field.field_name == "metrics":
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{value!r} is not HOST:PORT with a port from 0 to 65535")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            # gRPC would take its port for a part of the address.
            raise ValueError(f"{value!r}: an IPv6 address is written as [ADDRESS]:PORT")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        if value and not _COLLECTOR.fullmatch(value):
            raise ValueError("accepted is http://HOST:PORT or https://HOST:PORT of a collector")
        return value

    @field_validator("split", "device")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty; leave it out for the default")
        return value

    @field_validator("tls", "tokens", "ready_file", "offload_dir", mode="before")
    @classmethod
    def _is_a_path(cls, value: Any) -> Any:
        # Of an empty one Python would make the present folder.
        if value == "":
            raise ValueError("is empty; accepted is a path")
        return value

    @field_validator("split")
    @classmethod
    def _start_and_end(cls, value: str) -> str:
        SplitRange.parse(value)
        return value

    @field_validator("ready_file")
    @classmethod
    def _can_be_written(cls, value: Path | None) -> Path | None:
        if value is not None:
            if os.path.isdir(value):
                raise ValueError("is a folder; accepted is a file in a folder that exists")
            if not os.path.isdir(value.parent) or not os.access(value.parent, os.W_OK | os.X_OK):
                raise ValueError("accepted is a file in a folder that exists and may be written to")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.quantize:
            check_kind(self.quantize)
        if self.onednn and (self.dtype != "float32" or self.quantize or self.device[:3] != "cpu"):
            raise ValueError(
                f"--onednn with --dtype {self.dtype}, --device {self.device}"
                f"{f' and --quantize {self.quantize}' if self.quantize else ''}: it is for plain "
                f"float32 on a CPU"
            )
        return self

    @field_validator("peft_methods")
    @classmethod
    def _known_methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = sorted(PeftType)
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"{unknown} are not among {known}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Reads a TOML file last, if ``TRUNKD_CONFIG`` names one."""
        sources = [init_settings, env_settings]
        if file := os.environ.get("TRUNKD_CONFIG"):
            if not os.path.isfile(file):
                raise InvalidInputError(f"TRUNKD_CONFIG={file}: no such file")
            try:
                sources.append(TomlConfigSettingsSource(settings_cls, toml_file=file))
            except (OSError, ValueError) as error:
                raise InvalidInputError(
                    f"TRUNKD_CONFIG={file}: not readable as TOML ({error})"
                ) from error
        return tuple(sources)

    def limits(self) -> Limits:
        """What tenants may use."""
        names: Any = Limits.__dataclass_fields__
        return Limits(**{n: getattr(self, n) for n in names if hasattr(self, n)})
