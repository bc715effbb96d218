"""What a tenant may say of its adapters that must not do anything on a trunk."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shared.adapters.structure import AdapterSpec, LayerState, Structure, Value, setting
from shared.errors import AdapterError
from shared.tensor_bytes import as_bytes
from tests.one_process import Pair, load_trunk
from tests.peft_rows import ROWS
from trunk_service.sealed import sealed
from trunk_service.tenant_tree import TenantTree, TreeLimits
from trunk_service.trunk import Trunk

LIMITS = TreeLimits(max_rank=16, max_parameters=200_000)
MARK = "evil"
ROOT = Path(__file__).parents[2]
UP = ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
WATCHED = ("open", "import", "exec", "os.", "subprocess.", "shutil.", "socket.", "ctypes.")
TYPES = sorted(kind.value for kind in PeftType)
FIELDS = sorted(
    {f.name for made in PEFT_TYPE_TO_CONFIG_MAPPING.values() for f in dataclasses.fields(made)}
)
WORDS = (
    "/etc/evil",
    "evil/../../model.safetensors",
    "(evil+)+$",
    ".*evil.*|(a*)*b",
    "__evil__",
    "__class__",
    "evil.core",
    "os.system('evil')",
    "pissa_niter_4",
    "pissa",
    "eva",
    "loftq",
    "gaussian",
    "all-linear",
    "all",
    "dummy-target-modules",
    "cpu:evil",
    "evil\x00",
    "",
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


class Watch:
    """What happened in this process, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        self.patterns: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event.startswith(WATCHED):
            self.on = False  # what looking at it does is no event
            if MARK in str(args) or not _is_its_own(event, args):
                self.events.append(f"{event}{str(args)[:200]}")
            self.on = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        compile_ = re._compile  # type: ignore[attr-defined]

        def heard(pattern: Any, flags: Any) -> Any:
            self.patterns.append(str(pattern))
            return compile_(pattern, flags)

        re._compile = heard  # type: ignore[attr-defined]
        self.on = True
        try:
            yield
        finally:
            self.on = False
            re._compile = compile_  # type: ignore[attr-defined]


def _is_its_own(event: str, args: tuple[Any, ...]) -> bool:
    """What libraries do whatever they are given: no word of a tenant's is in it."""
    if event == "open":
        return args[1] == "r" and str(args[0]).startswith((sys.prefix, str(ROOT)))
    if event == "os.listdir":  # where that package could be, if the folder has changed since
        return str(args[0]) in sys.path
    # AdaMSS looks for a package that PEFT does not require; accelerate asks for devices by a
    # variable of the environment.
    return event in ("os.putenv", "os.unsetenv") or (event == "import" and args[0] == "sklearn")


WATCH = Watch()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    made = load_trunk("llama", Path(tmp_path_factory.mktemp("tiny")))
    # What PEFT imports when it first needs it.
    for word in ("use_dora", "use_qalora", "lora_bias", "use_rslora"):
        refuse(made, (AdapterSpec("a", "LORA", UP, settings={word: True}),))
    for kind in TYPES:
        refuse(made, (AdapterSpec("a", kind, ("model.layers.1.mlp.up_proj",)),))
        with contextlib.suppress(AdapterError):  # evaluates the annotations of PEFT's own source
            setting(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], "revision", "")
    return made


def refuse(trunk: Trunk, specs: tuple[AdapterSpec, ...]) -> str:
    """Nobody sends values here, so whatever is built is refused after all."""
    tree = TenantTree(trunk._part, LIMITS)
    state = tree.state
    with pytest.raises(AdapterError) as caught:
        tree.update(Structure(specs, ()), (), ())
    assert tree.state is state
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def weights(trunk: Trunk) -> str:
    found = hashlib.sha256()
    for tensor in [*trunk._part.parameters(), *trunk._part.buffers()]:
        found.update(as_bytes(tensor))
    return found.hexdigest()


OWN = (
    "model.layers.1.mlp.up_proj",
    "model.layers.2.self_attn.q_proj",
    "model.layers.1.input_layernorm",
    "model.layers.1",
    "model.layers.2.mlp",
    "model.layers.1.mlp.act_fn",
)
OUTSIDE = (
    "model",
    "model.layers",
    "model.norm",
    "model.layers.0.mlp.up_proj",
    "up_proj",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.base_layer",
    r"model\.layers\..*",
    "",
)
numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 7, 16, 17, 10**6, 2**31, 2**62, -(2**63)]),
    st.sampled_from([0.0, 0.5, -1.5, 1e30, float("inf"), float("nan")]),
    st.booleans(),
)
names = st.sampled_from((*OWN, *OUTSIDE, *WORDS))
values = st.one_of(numbers, st.sampled_from(WORDS))
anything = st.one_of(
    values,
    st.none(),
    st.binary(max_size=4),
    st.lists(names, max_size=2),
    st.dictionaries(names, values, max_size=2),
)
adapters = st.builds(
    AdapterSpec,
    name=st.one_of(st.sampled_from(["default", "a.b", "forward", "keys", "__base__", *WORDS])),
    peft_type=st.sampled_from([*TYPES, *WORDS[:4]]),
    target_modules=st.lists(st.sampled_from(OWN), max_size=3).map(tuple) | st.tuples(names, names),
    feedforward_modules=st.lists(names, max_size=1).map(tuple),
    modules_to_save=st.lists(names, max_size=1).map(tuple),
    ranks=st.dictionaries(names, anything, max_size=1),
    alphas=st.dictionaries(names, anything, max_size=1),
    settings=st.dictionaries(st.sampled_from([*FIELDS, *WORDS[:6]]), anything, max_size=3),
)


@st.composite
def nearly_right(draw: Any) -> AdapterSpec:
    """Of the right names, and numbers for the method's own fields: these are built."""
    kind = draw(st.sampled_from(TYPES))
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = [f.name for f in dataclasses.fields(made)]
    return AdapterSpec(
        "default",
        kind,
        tuple(draw(st.lists(st.sampled_from(OWN[:2]), min_size=1, max_size=2, unique=True))),
        settings=draw(st.dictionaries(st.sampled_from(fields), values, max_size=2)),
        ranks=draw(st.dictionaries(st.sampled_from(OWN[:2]), numbers, max_size=1)),
    )


def nothing_happens(trunk: Trunk, spec: AdapterSpec) -> None:
    WATCH.events, WATCH.patterns = [], []
    with WATCH.watching():
        refuse(trunk, (spec,))
    assert not WATCH.events, WATCH.events
    assert not [pattern for pattern in WATCH.patterns if MARK in pattern or "pissa" in pattern]


QUICK = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
LONG = settings(QUICK, max_examples=5000)


def _hostile(trunk: Trunk, how: Any) -> None:
    before = weights(trunk)

    @how
    @given(st.one_of(adapters, nearly_right()))
    def try_one(spec: AdapterSpec) -> None:
        nothing_happens(trunk, spec)

    try_one()
    assert weights(trunk) == before
    assert not any(p.requires_grad for p in trunk._part.parameters())


def test_what_a_tenant_says_opens_imports_and_matches_nothing(trunk: Trunk) -> None:
    _hostile(trunk, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_adapters_do_nothing(trunk: Trunk) -> None:
    for _ in range(2):
        _hostile(trunk, LONG)


def live_bytes() -> int:
    """Of tensors that have bytes: other tests of this process may have left fake ones."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # fake, functional, batched: no storage
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _differs(limits: TreeLimits) -> tuple[Structure, TreeLimits]:
    return Structure((AdapterSpec("a", "LORA", UP, settings={"r": 256}),)), limits


def _is_too_large(limits: TreeLimits) -> tuple[Structure, TreeLimits]:
    structure, _ = _differs(limits)
    return structure, TreeLimits(max_parameters=1000)


def _fails_halfway(limits: TreeLimits) -> tuple[Structure, TreeLimits]:
    targets = (*UP, "model.layers.2.input_layernorm")
    return Structure((AdapterSpec("a", "LORA", targets, settings={"r": 256}),)), limits


def _runs_away(limits: TreeLimits) -> tuple[Structure, TreeLimits]:
    wide = {"n_frequency": 2**31}
    return Structure((AdapterSpec("a", "FOURIERFT", UP, settings=wide),)), limits


@pytest.mark.parametrize("case", [_differs, _is_too_large, _fails_halfway, _runs_away])
def test_refused_adapters_leave_no_memory_behind(
    trunk: Trunk, case: Callable[[TreeLimits], tuple[Structure, TreeLimits]]
) -> None:
    structure, limits = case(TreeLimits())
    tree = TenantTree(trunk._part, limits)

    def refused() -> None:
        with contextlib.suppress(AdapterError):
            tree.update(structure, (), ())
            raise AssertionError("it was not refused")

    refused()
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        for _ in range(40):
            refused()
        assert live_bytes() - before < 4 * 256 * 64  # not one matrix of one adapter
    finally:
        gc.enable()


def test_limits_are_those_given(trunk: Trunk) -> None:
    pair = Pair("llama", trunk)
    pair.adapt_split(next(row for row in ROWS if row.name == "LoRA").config("llama"))
    count = sum(t.numel() for v, t in pair.tensors() if "lora" in v.names[0])
    pair.tree(TreeLimits(max_parameters=count))
    for limits, why in (
        (TreeLimits(max_parameters=count - 1), f"adapter of {count} parameters"),
        (TreeLimits(max_rank=3), "rank r=4"),
        (TreeLimits(max_adapters=0), "accepts up to 0"),
    ):
        with pytest.raises(AdapterError, match=why):
            pair.tree(limits)


def test_a_tenant_cannot_reach_another_s_flags_or_the_shared_weights(trunk: Trunk) -> None:
    one, other = (Pair("llama", trunk) for _ in range(2))
    row = next(row for row in ROWS if row.name == "LoRA, bias=all")
    for pair in (one, other):
        pair.adapt_split(row.config("llama"))
    trees = [pair.tree() for pair in (one, other)]
    name = "model.layers.1.input_layernorm.weight"
    trees[0].update(None, [Value((name,), True)], [torch.full((64,), 2.0)])
    hidden = torch.randn(1, 3, 64)
    outputs = [tree.model(inputs_embeds=hidden).last_hidden_state for tree in trees]
    assert not torch.equal(*outputs)
    assert trees[0].leaves[name].requires_grad
    assert not trees[1].model.get_parameter(name).requires_grad
    assert not trunk._part.get_parameter(name).requires_grad
    assert not trees[1].parameters or name not in trees[1].leaves


def test_building_starts_no_process_and_writes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with sealed():
        for act in (
            lambda: path.write_text("x"),
            lambda: path.open("a"),
            lambda: os.open(path, os.O_CREAT | os.O_WRONLY),
            lambda: path.mkdir(),
            lambda: Path("/etc/passwd").read_text(),
            lambda: subprocess.run(["true"]),
            lambda: os.system("true"),
            lambda: socket.socket(),
        ):
            with pytest.raises(PermissionError, match="does nothing to this machine"):
                act()
        assert Path(torch.__file__).read_text()
    path.write_text("x")


def test_layers_states_of_nonsense_are_refused(trunk: Trunk) -> None:
    pair = Pair("llama", trunk)
    row = next(row for row in ROWS if row.name == "LoRA")
    pair.adapt_split(row.config("llama"))
    tree, structure = pair.tree(), pair.structure()
    for layer in (
        LayerState("model.layers.1.self_attn", dropout=float("nan")),
        LayerState("model.layers.1.self_attn", dropout=-0.5),
        LayerState("__class__", dropout=0.5),
    ):
        layers = [one for one in structure.layers if one.module != layer.module]
        with pytest.raises(AdapterError):
            tree.update(Structure(structure.adapters, (*layers, layer)), (), ())
