"""Tensors between the wire's memory and the device that computes.

On a CPU both are the same. To and from CUDA, copies go through pinned memory on a stream of their
own, so that they run beside what other sessions compute.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside_compute(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies, behind what has been given to the one that computes so far."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Brings what came over the wire to where it is computed on, in the dtype of that."""
    if device.type != "cuda":
        return tensor.to(device, dtype)
    pinned, stream = tensor.pin_memory(), _stream(device)
    with torch.cuda.stream(stream):
        moved = pinned.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    moved.record_stream(current)  # its memory is not to be given to another while this one reads
    return moved.to(dtype)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Brings a result to the memory that the wire reads; on a CPU it is there."""
    if tensor.device.type != "cuda":
        return tensor
    stream = beside_compute(tensor.device)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return host
