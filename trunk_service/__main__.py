"""``trunkd``, also ``python -m trunk_service``: the trunk daemon as a process."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp, SettingsError

from shared.bundled import model_dir
from shared.errors import InvalidInputError, TrunklineError
from shared.freed_memory import return_freed_memory
from shared.logs import log_json
from shared.models import SplitRange
from trunk_service.access import open_access
from trunk_service.joint_decoding import JointDecoding
from trunk_service.joint_forwards import JointForwards
from trunk_service.observation import serve_observation
from trunk_service.offload import OffloadArea
from trunk_service.registry import SessionRegistry
from trunk_service.scheduler import Scheduler
from trunk_service.server import TrunkServer
from trunk_service.settings import TrunkSettings
from trunk_service.trunk import Trunk

logger = logging.getLogger("trunk_service")


def main() -> None:
    """Runs the daemon until SIGTERM or SIGINT; exits 2 when it cannot start as told."""
    try:
        settings = CliApp.run(TrunkSettings, cli_args=sys.argv[1:])
        log_json(settings.log_level)
        asyncio.run(serve(settings))
    except ValidationError as error:
        _refuse("; ".join(map(_described, error.errors())))
    except (TrunklineError, SettingsError, OSError) as error:
        _refuse(str(error))


def _refuse(said: str) -> NoReturn:
    sys.stderr.write(f"trunkd: {' '.join(said.split())}\n")
    sys.exit(2)


def _described(found: ErrorDetails) -> str:
    """A value that was refused: its name, what was given and why."""
    said = found["msg"].removeprefix("Value error, ")
    if not found["loc"]:
        return said  # of values together, which it names
    given = found["input"]
    shown = shlex.quote(given) if isinstance(given, str) else given
    return f"--{str(found['loc'][0]).replace('_', '-')} {shown}: {said}"


async def serve(settings: TrunkSettings) -> None:
    """Loads the trunk, serves it, and drains when told to stop.

    Raises:
        TrunklineError: If the model cannot be loaded, the address not be bound, or clients would
            be let in from other hosts without TLS.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    access = open_access(settings.listen, settings.tls, settings.tokens, settings.insecure)
    registry = _registry(settings)
    server = TrunkServer(
        registry, access.authenticator, access.credentials, with_reflection=settings.reflection
    )
    # What is loaded stays: collections need not visit it, each of which would hold up a request.
    gc.collect()
    gc.freeze()
    port = await server.start(settings.listen)
    address = f"{settings.listen.rpartition(':')[0]}:{port}"
    metrics_port, stop_observation = serve_observation(
        registry, settings.metrics, settings.otlp_endpoint
    )
    if metrics_port:
        metrics = f"{settings.metrics.rpartition(':')[0]}:{metrics_port}"
        logger.info("metrics", extra={"address": metrics})
    _announce(settings, registry, address, access.off)
    await stop.wait()
    await server.drain(settings.drain_timeout_s)
    stop_observation()


def _registry(settings: TrunkSettings) -> SessionRegistry:
    split = SplitRange.parse(settings.split)
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"device {settings.device!r} cannot be used: {error}") from error
    offload = None
    if settings.offload_bytes:
        offload = OffloadArea(settings.offload_bytes, settings.offload_dir, device)
    cores = len(os.sched_getaffinity(0))
    threads = settings.threads or max(1, cores // settings.workers)
    torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    model = settings.model or model_dir()
    trunk = Trunk.load(model, split, device, dtype, settings.quantize, settings.onednn)
    trunk.offload = offload
    return_freed_memory()
    workers = cores if settings.adaptive else settings.workers
    scheduler = Scheduler(workers, threads, adaptive=settings.adaptive)
    registry = SessionRegistry(trunk, settings.limits(), scheduler)
    if settings.batch_decoding:
        forwards = JointForwards(JointDecoding(trunk, registry.budget), registry.metrics)
        scheduler.join(forwards.run, settings.batch_decoding)
    return registry


def _announce(
    settings: TrunkSettings, registry: SessionRegistry, address: str, off: tuple[str, ...]
) -> None:
    info = registry.trunk.info
    facts = {
        "address": address,
        "pid": os.getpid(),
        "model_type": info.model_type,
        "split": str(info.split),
        "weight_digest": info.weight_digest,
    }
    logger.info("serving", extra=facts | {"off": off})
    if settings.ready_file is not None:
        _write_whole(settings.ready_file, json.dumps(facts))


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
