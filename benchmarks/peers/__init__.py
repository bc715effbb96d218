"""Systems that do the same training step: ours, what it is measured against, and how to run them.

Every module with a ``main`` is a driver, a process that :mod:`benchmarks.peers.running` starts and
asks for steps; those of other libraries run in virtual environments of their own.
"""
