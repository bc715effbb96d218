"""What both sides of a split model need: its parts, its adapters, the wire and the errors."""

import logging

__version__ = "0.1.0"

# Where bitsandbytes is installed, PEFT imports it, and it warns that an optional kernel is not: a
# kernel in bfloat16 without autograd, which is never used here (shared.models.quantization).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
