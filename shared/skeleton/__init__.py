"""The trunk's blocks without their matrices, for the client: what stock PEFT adapts."""

from shared.skeleton.remote_tensor import Fetch, Norms, RemoteTensor, remote_parameter
from shared.skeleton.skeleton import hollow, skeleton_blocks

__all__ = ["Fetch", "Norms", "RemoteTensor", "hollow", "remote_parameter", "skeleton_blocks"]
