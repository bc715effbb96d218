"""Exits 0 if the trunk daemon of this container says that it is serving."""

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

with grpc.insecure_channel("127.0.0.1:50052", [("grpc.enable_http_proxy", 0)]) as channel:
    answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=4)
sys.exit(answer.status != HealthCheckResponse.SERVING)
