"""A well-behaved client beside the fuzzed ones, whose numbers must never change."""

from __future__ import annotations

import threading
import time

import torch
from peft import LoraConfig

from client_service import TrainingClient
from shared.errors import ResourceExhaustedError, TrunklineError
from tests.fuzz.valid import HIDDEN_SIZE
from tests.patience import PATIENCE_S


class Bystander:
    """Trains one step over and over from the same weights, in a thread of its own.

    Args:
        address: The trunk.
        every_s: Pause between the rounds.
    """

    def __init__(self, address: str, every_s: float) -> None:
        config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        self._client = TrainingClient(address, config, seed=7)
        self._every_s = every_s
        generator = torch.Generator().manual_seed(3)
        self._hidden_BTD = torch.randn(2, 9, HIDDEN_SIZE, generator=generator)
        self._trained = self._client.parameters()
        # Both of LoRA's matrices matter from the start.
        self._start = [torch.randn(p.shape, generator=generator) * 0.05 for p in self._trained]
        self.rounds = 0
        self.fault: str | None = None
        self._expected = self._round()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the rounds with one more."""
        self._stop.set()
        self._thread.join()
        if self.fault is None:
            self._check()
            self._client.close()

    def _run(self) -> None:
        while self.fault is None and not self._stop.wait(self._every_s):
            self._check()

    def _check(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                found = self._round()
                break
            except ResourceExhaustedError as error:
                # What all sessions of a tenant share may be spent for a moment, not for long.
                if time.monotonic() > deadline:
                    self.fault = f"the bystander is refused for {PATIENCE_S:g} s: {error}"
                    return
                time.sleep(min(1.0, error.retry_after_s or 0.1))
            except TrunklineError as error:
                self.fault = f"the bystander got {type(error).__name__}: {error}"
                return
        self.rounds += 1
        pairs = zip(found, self._expected, strict=True)
        changed = [number for number, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
        if changed:
            self.fault = f"the bystander's numbers changed in round {self.rounds}: {changed[:3]}"

    def _round(self) -> list[torch.Tensor]:
        """A step's output, gradients and, with the weights it leads to, another output."""
        client = self._client
        with torch.no_grad():
            for parameter, start in zip(self._trained, self._start, strict=True):
                parameter.copy_(start)
                parameter.grad = None
        output_BTD = client.forward(self._hidden_BTD, "round").detach()
        found = [output_BTD, client.backward(output_BTD, "round")]
        found += [p.grad for p in self._trained if p.grad is not None]
        torch.optim.SGD(self._trained, lr=0.01).step()
        return [*found, client.compute(self._hidden_BTD)]
