"""The trunk daemon: holds the middle blocks and computes for many tenants at once."""

import os

from shared.openmp import wait_passively

wait_passively()
# gRPC's own lines are no JSON, and every failed handshake of a stranger would write some. It looks
# at this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
