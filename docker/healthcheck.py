"""Exits 0 if the trunk daemon of this container takes new work.

With ``TRUNKLINE_TLS``, a folder of ca.pem, cert.pem and key.pem, it asks over TLS as that client.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

ADDRESS = os.environ.get("TRUNKLINE_HEALTH_ADDRESS", "127.0.0.1:50052")
OPTIONS = [("grpc.enable_http_proxy", 0)]


def open_channel() -> grpc.Channel:
    """Opens a channel to the daemon, with TLS if there are files for it."""
    if not (tls := os.environ.get("TRUNKLINE_TLS")):
        return grpc.insecure_channel(ADDRESS, OPTIONS)
    ca, key, cert = (Path(tls, name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
    return grpc.secure_channel(ADDRESS, grpc.ssl_channel_credentials(ca, key, cert), OPTIONS)


with open_channel() as channel:
    answer = HealthStub(channel).Check(HealthCheckRequest(service="readiness"), timeout=4)
sys.exit(answer.status != HealthCheckResponse.SERVING)
