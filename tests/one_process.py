"""A whole PEFT model beside a composition of hollow blocks and a tenant's tree, without a wire."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import Cache, DynamicCache

from client_service.adapter_structure import Blocks, adapter_structure, adapter_tensors
from client_service.unchanged_blocks import UnchangedBlocks
from shared.adapters.structure import Structure, Value, base_name
from shared.errors import SharedWeightsError, TrunklineError
from shared.models import SplitRange
from shared.models.families import Family, family_of
from shared.skeleton import Fetch, Norms, skeleton_blocks
from tests.models import save_tiny_model, tiny_model
from tests.peft_rows import Row
from trunk_service.tenant_tree import TenantTree, TreeLimits
from trunk_service.trunk import Trunk

SPLIT = SplitRange(1, 3)
TOKENS = 7
CLOSE = 1e-6  # where a library sums in another order
BLOCKS = {"gpt2": {"n_layer": 4}}


def changes(family: str) -> dict[str, Any]:
    return dict(BLOCKS.get(family, {"num_hidden_layers": 4}))


def load_trunk(family: str, folder: Path) -> Trunk:
    path = save_tiny_model(family, folder / family, **changes(family))
    return Trunk.load(path, SPLIT, torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Matrices:
    """What a trunk gives of its matrices: their norms, and themselves if it serves them."""

    trunk: Trunk
    served: bool

    def __call__(self, name: str) -> tuple[Fetch, Norms]:
        rows, columns = (functools.partial(self.trunk.norms, name, of) for of in (False, True))
        return functools.partial(self._value, name), (rows, columns)

    def _value(self, name: str) -> torch.Tensor:
        if not self.served:
            raise SharedWeightsError(f"{name} is not given away: the host allows --serve-weights")
        return self.trunk.matrix(name).clone()  # as the wire does


class Pair:
    """The same adapter on both, from one seed.

    Args:
        family: Model type.
        trunk: Of the tiny model of that family.
        served: Whether base matrices may be fetched.
    """

    def __init__(self, family: str, trunk: Trunk, served: bool = True) -> None:
        self.family: Family = family_of(family)
        self.part = trunk._part
        self.whole: Any = tiny_model(family, **changes(family))
        self.split: Any = hollowed(self.whole, self.family, Matrices(trunk, served))
        self._unchanged = UnchangedBlocks(*self._parts(), self.split.config)
        self.peft: Any = None
        self.peft_split: Any = None

    def adapt_whole(self, config: PeftConfig) -> None:
        torch.manual_seed(3)
        self.peft = get_peft_model(self.whole, copy.deepcopy(config))

    def adapt_split(self, config: PeftConfig) -> None:
        torch.manual_seed(3)
        self.peft_split = get_peft_model(self.split, copy.deepcopy(config))

    @property
    def blocks(self) -> Blocks:
        base = getattr(self.split, self.family.base)
        layers = getattr(base, self.family.layers)
        prefix = self.family.layer_prefix
        found = [(f"{prefix}{i}", layers[i]) for i in range(SPLIT.start, SPLIT.end)]
        rotary = getattr(base, "rotary_emb", None)
        return [*found, *([] if rotary is None else [(f"{self.family.base}.rotary_emb", rotary)])]

    def _parts(self) -> tuple[Blocks, Blocks]:
        count = SPLIT.end - SPLIT.start
        return self.blocks[:count], self.blocks[count:]

    def tensors(self) -> list[tuple[Value, torch.Tensor]]:
        return adapter_tensors(self.blocks, torch.float32)

    def structure(self) -> Structure:
        configs = {} if self.peft_split is None else self.peft_split.peft_config
        self._unchanged.check(*self._parts(), self.split.config)
        return adapter_structure(self.blocks, configs)

    def tree(self, limits: TreeLimits | None = None) -> TenantTree:
        tree = TenantTree(self.part, limits)
        self.push(tree)
        return tree

    def push(self, tree: TenantTree) -> None:
        values, tensors = zip(*self.tensors(), strict=True)
        tree.update(self.structure(), values, tensors)

    def both(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """Parameters that are trained, of whole and split."""
        whole, split = (dict(m.named_parameters()) for m in (self.whole, self.split))
        assert list(whole) == list(split)
        assert [p.requires_grad for p in whole.values()] == [
            p.requires_grad for p in split.values()
        ]
        return [(n, p, split[n]) for n, p in whole.items() if p.requires_grad]

    def push_changed(self, tree: TenantTree) -> None:
        """Sends what is no more as it was, and no structure."""
        known = tree.leaves
        changed = [
            (value, tensor)
            for value, tensor in self.tensors()
            if value.names[0] in known and not torch.equal(known[value.names[0]], tensor)
        ]
        tree.update(None, [value for value, _ in changed], [tensor for _, tensor in changed])

    def perturb(self, scale: float = 0.05, seed: int = 7) -> None:
        """Moves what is trained, on both sides alike, so that it matters."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter, twin in self.both():
                assert torch.equal(parameter, twin), name
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator) * scale
                    parameter.add_(noise.to(parameter.dtype))
                    twin.copy_(parameter)

    def returned(self, found: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """What the client's autograd makes of gradients from a trunk: hooks of PEFT's run."""
        own = {value.names[0]: tensor for value, tensor in self.tensors()}
        made: dict[str, torch.Tensor | None] = {}
        for name, gradient in found.items():
            if gradient is not None:
                product = (own[name] * gradient).sum()
                gradient = torch.autograd.grad(product, own[name])[0]
            made[name] = gradient
        return made

    def run_whole(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The trunk's blocks of the whole model: hidden states in, a leaf; out; the cache given."""
        found: dict[str, Any] = {"cache": None}

        def enter(block: Any, args: Any, kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Cache):
                    slots = given.layers[SPLIT.start : SPLIT.end]
                    found["cache"] = [(s.keys.clone(), s.values.clone()) for s in slots]
            found["in"] = args[0].detach().requires_grad_(True)
            return (found["in"], *args[1:]), kwargs

        def leave(block: Any, args: Any, output: Any) -> None:
            found["out"] = output[0] if isinstance(output, tuple) else output

        layers = getattr(getattr(self.whole, self.family.base), self.family.layers)
        hooks = [
            layers[SPLIT.start].register_forward_pre_hook(enter, with_kwargs=True),
            layers[SPLIT.end - 1].register_forward_hook(leave),
        ]
        ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) + 5
        try:
            (self.peft or self.whole)(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found["in"], found["out"], found["cache"]


def run_tree(tree: TenantTree, hidden: torch.Tensor, slots: Any = None) -> torch.Tensor:
    cache = None
    if slots is not None:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(slots):
            cache.update(keys.detach(), values.detach(), index)
    model = tree.model
    output = model(inputs_embeds=hidden, use_cache=cache is not None, past_key_values=cache)
    return output.last_hidden_state  # type: ignore[no-any-return]


def hollowed(whole: Any, family: Family, fetch_of: Any) -> Any:
    """A copy of a model whose trunk's blocks are hollow."""
    made = copy.deepcopy(whole)
    vectors = {n: p for n, p in whole.named_parameters() if p.ndim < 2}
    blocks = skeleton_blocks(whole.config, family, SPLIT, vectors, torch.float32, fetch_of)
    layers = getattr(getattr(made, family.base), family.layers)
    for name, block in blocks:
        layers[int(name)] = block
    return made


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences between whole and composition."""

    output: float
    hidden: float
    adapter: float
    effect: float
    """How far the adapter moves the output from that of the bare blocks."""

    @property
    def worst(self) -> float:
        return max(self.output, self.hidden, self.adapter)


def compare(pair: Pair, tree: TenantTree) -> Differences:
    """Runs both, and their gradients by random weights on the outputs."""
    pair.peft.train()
    tree.train(True)
    hidden, out, slots = pair.run_whole()
    ours_in = hidden.detach().clone().requires_grad_(True)
    ours = run_tree(tree, ours_in, slots)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator)
    whole = pair.whole.named_parameters(remove_duplicate=False)
    named = {base_name(name): parameter for name, parameter in whole}
    trained = {n: t for n, t in tree.leaves.items() if t.requires_grad}
    expected = torch.autograd.grad(
        (out * weights).sum(), [hidden, *(named[n] for n in trained)], allow_unused=True
    )
    found = torch.autograd.grad(
        (ours * weights).sum(), [ours_in, *trained.values()], allow_unused=True
    )
    tree.check_unwritten()
    returned = pair.returned(dict(zip(trained, found[1:], strict=True)))
    bare = run_tree(TenantTree(pair.part), hidden.detach(), slots)
    pairs = zip(expected[1:], returned.values(), strict=True)
    return Differences(
        output=_off(out, ours),
        hidden=_off(expected[0], found[0]),
        adapter=max((_off(a, b) for a, b in pairs), default=0.0),
        effect=_off(bare, ours),
    )


@dataclass(frozen=True)
class Outcome:
    """What came of one row."""

    kind: str
    """``equal``, ``refused``, ``different``; or ``whole fails``, without a split."""
    why: str = ""
    differences: Differences | None = None
    adapted: bool = False
    """Whether the adapter has tensors in the trunk's blocks."""


def outcome(row: Row, family: str, trunk: Trunk, served: bool) -> Outcome:
    """Tries a row of PEFT's methods: fresh, and once more with other values."""
    pair = Pair(family, trunk, served)
    try:
        config = row.config(family)
        pair.adapt_whole(config)
        pair.peft.train()
        pair.run_whole()
    except Exception as error:
        return Outcome("whole fails", f"{type(error).__name__}: {error}")
    try:
        pair.adapt_split(config)
        tree = pair.tree()
        run_tree(tree, torch.zeros(1, 2, trunk.info.hidden_size))
        tree.check_unwritten()
    except TrunklineError as error:
        return Outcome("refused", str(error))
    except (ValueError, TypeError) as error:  # PEFT's own, of a layer that is hollow
        return Outcome("refused", f"PEFT: {error}")
    pair.perturb(seed=7)
    pair.push_changed(tree)
    first = compare(pair, tree)
    pair.perturb(seed=8)
    pair.push_changed(tree)
    second = compare(pair, tree)
    worst = max(first, second, key=lambda d: d.worst if math.isfinite(d.worst) else math.inf)
    kind = "equal" if worst.worst <= CLOSE else "different"
    adapted = bool(pair.structure().adapters)
    return Outcome(kind, differences=worst, adapted=adapted)


def _off(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0
