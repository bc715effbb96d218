"""The trunk daemon: holds the middle blocks and computes for many tenants at once."""

from shared.openmp import wait_passively

wait_passively()
