"""What Trunkline costs and gains, beside the whole model and other systems."""

from shared.openmp import wait_passively

wait_passively()
