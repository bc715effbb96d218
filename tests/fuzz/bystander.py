"""A well-behaved client beside the fuzzed ones, whose numbers must never change."""

from __future__ import annotations

import threading
import time

import torch
from peft import LoraConfig

from client_service.optimizer_spec import adamw
from client_service.session import ForwardCall, SessionTerms, TrunkSession
from shared.adapters.config import config_to_json
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
        config = config_to_json(LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
        self._session = TrunkSession(address, SessionTerms(peft_config_json=config, seed=7))
        self._every_s = every_s
        generator = torch.Generator().manual_seed(3)
        self._hidden_BTD = torch.randn(2, 9, HIDDEN_SIZE, generator=generator)
        # Both of LoRA's matrices matter from the start.
        self._start = {
            name: torch.randn(weight.shape, generator=generator) * 0.05
            for name, weight in self._session.adapter().items()
        }
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
            self._session.close()

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
        changed = [n for n, t in found.items() if not torch.equal(t, self._expected[n])]
        if changed or found.keys() != self._expected.keys():
            self.fault = f"the bystander's numbers changed in round {self.rounds}: {changed[:3]}"

    def _round(self) -> dict[str, torch.Tensor]:
        session, name = self._session, f"round{self.rounds}/{time.monotonic_ns()}"
        session.restore(self._start, step=0)
        call = ForwardCall(request_id=name, keep_graph=True, training=True, step=1)
        output_BTD = session.forward(self._hidden_BTD, call).hidden_BTD
        gradient_BTD, norm = session.backward(output_BTD, name)
        assert gradient_BTD is not None
        found = {"output": output_BTD, "gradient": gradient_BTD, "norm": torch.tensor(norm)}
        found |= session.gradients()
        # A learning rate of zero keeps the optimizer's moments, which differ from round to round,
        # out of the weights.
        session.step(1, 1.0, adamw(0.0))
        return found | {f"after/{name}": weight for name, weight in session.adapter().items()}
