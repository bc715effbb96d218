"""How messages and tensors travel: valid protobuf, without protobuf's copies of the tensors."""
