"""Peers that know the protocol and break its rules on purpose, where random harm rarely reaches."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.fuzz.hostile_settings import SETTINGS_CASES, real, whole
from tests.fuzz.mutations import MAX_FRAME
from tests.fuzz.script import GET_INFO, SESSION, Script, Stream
from tests.fuzz.valid import HIDDEN_SIZE, Sequence

F32 = pb.DATA_TYPE_FLOAT32


def spec(shape: list[int], data_type: int = F32, name: str = "hidden_states") -> pb.TensorSpec:
    """An announcement of any kind."""
    kind: Any = data_type
    return pb.TensorSpec(name=name, data_type=kind, shape=shape)


def forward_of(specs: list[pb.TensorSpec], data: bytes, **fields: Any) -> pb.SessionRequest:
    """A forward whose announcement and bytes are made up."""
    return pb.SessionRequest(forward=pb.Forward(**fields), tensors=specs, data=data)


def structure_of(structure: pb.Structure, values: Any = ()) -> pb.SessionRequest:
    """A forward that brings a structure, and values whose numbers are missing."""
    state = pb.AdapterState(version=1, structure=structure, values=values)
    shape = [1, 1, HIDDEN_SIZE]
    return forward_of([spec(shape)], bytes(4 * HIDDEN_SIZE), state=state, state_version=1)


def wrong_lengths(built: Sequence) -> None:
    """Fewer or more bytes than were announced, in one frame or several."""
    size = 4 * HIDDEN_SIZE
    lengths = (0, 1, size - 1, size + 1, 2 * size, 4 * size)
    for _ in range(4):
        built.send(forward_of([spec([1, 1, HIDDEN_SIZE])], bytes(built.rng.choice(lengths))))
        rest = pb.SessionRequest(id=built.rng.randrange(9), data=bytes(built.rng.choice(lengths)))
        built.frames.append(rest.SerializeToString())


def vast_shapes(built: Sequence) -> None:
    """Shapes whose size overflows, or whose dimensions are none."""
    for _ in range(6):
        rank = built.rng.choice((0, 1, 2, 3, 3, 3, 4, 8, 9, 64, 1000))
        shape = [whole(built.rng) for _ in range(rank)]
        if built.rng.random() < 0.3 and rank:
            shape[built.rng.randrange(rank)] = 0
        data_type = built.rng.choice((F32, 4, 9, 0, 10, 99, 2**31 - 1, -1, -(2**31)))
        built.send(forward_of([spec(shape, data_type)], built.rng.randbytes(16)))


def endless_chunks(built: Sequence) -> None:
    """Messages that never become whole, with data frames for them and for others, for long."""
    for _ in range(built.rng.choice((1, 70))):
        built.send(forward_of([spec([8, 8, HIDDEN_SIZE])], b"1234"))
    for number in range(built.rng.choice((50, 2000))):
        frame = pb.SessionRequest(id=built.rng.choice((2, 3, number)), data=bytes(number % 7))
        built.frames.append(frame.SerializeToString())


def many_open_messages(built: Sequence) -> None:
    """Thousands of messages begun, none of them finished."""
    for _ in range(built.rng.choice((65, 500, 3000))):
        shape = [1, built.rng.randrange(1, 64), HIDDEN_SIZE]
        built.send(forward_of([spec(shape)], b""))


def odd_values(built: Sequence) -> None:
    """Tensors of the right shape whose values or types nothing can be computed with."""
    shape = (2, 3, HIDDEN_SIZE)
    for _ in range(5):
        hidden = torch.zeros(shape, dtype=torch.float64)
        hidden.view(-1)[built.rng.randrange(hidden.numel())] = real(built.rng)
        hidden = hidden.to(built.rng.choice((torch.float32, torch.float32, torch.float64)))
        tensors = {"hidden_states": hidden}
        mask_shape = built.rng.choice(((2, 3), (2, 1, 3, 3), (2, 3, 3), (1, 3), (), (2, 0)))
        kind = built.rng.choice((torch.bool, torch.int64, torch.uint8, torch.int8, torch.float32))
        if built.rng.random() < 0.7:
            fill = built.rng.choice((0, 1, -1, 100, float("-inf"), float("nan")))
            whole_fill = int(fill) if abs(fill) < 1000 else 0
            tensors["attention_mask"] = torch.full(
                mask_shape, fill if kind is torch.float32 else whole_fill % 120
            ).to(kind)
        if built.rng.random() < 0.5:
            value = built.rng.choice((0, 1, 127, 128, -1, 2**62, -(2**63)))
            position_shape = built.rng.choice(((1, 3), (2, 3), (3,), (1, 0), (2, 3, 1)))
            tensors["position_ids"] = torch.full(position_shape, value, dtype=torch.int64)
        name, cached = f"odd{built.rng.randrange(2)}", built.rng.random() < 0.3
        body = pb.Forward(
            request_id="" if cached else name,
            keep_graph=not cached,
            cache_id=name if cached else "",
            training=built.rng.random() < 0.5,
            state_version=built.version,
            dropout_key=bytes(32),
        )
        built.send(pb.SessionRequest(forward=body), tensors)
        backward = pb.Backward(request_id=name, need_input_gradient=True)
        gradient = torch.full(shape, real(built.rng), dtype=torch.float64).to(torch.float32)
        built.send(pb.SessionRequest(backward=backward), {"gradient": gradient})


def odd_caches(built: Sequence) -> None:
    """Edits of caches that do not fit them, or make them vast, or change them back and forth."""
    rng = built.rng
    for _ in range(6):
        edits = []
        for _ in range(rng.choice((1, 1, 2, 5, 200))):
            count, repeats = rng.choice((0, 1, 4, 2**32 - 1)), rng.choice((0, 1, 2, 2**31))
            numbers = [rng.choice((0, 0, 1, 2, 2**32 - 1)) for _ in range(rng.randrange(4))]
            edits.append(rng.choice((
                pb.CacheOp(),
                pb.CacheOp(reset=pb.CacheOp.Reset()),
                pb.CacheOp(reorder=pb.CacheOp.Reorder(indices=numbers)),
                pb.CacheOp(reorder=pb.CacheOp.Reorder(indices=[0] * rng.choice((1, 2, 10**5)))),
                pb.CacheOp(crop=pb.CacheOp.Crop(tokens_to_remove=count)),
                pb.CacheOp(repeat=pb.CacheOp.Repeat(repeats=repeats)),
            )))  # fmt: skip
        hidden = torch.zeros(rng.choice((1, 1, 2, 4)), rng.choice((1, 1, 4, 60)), HIDDEN_SIZE)
        name = rng.choice(("c", "c", "d", "\0", "é" * 1000))
        body = pb.Forward(cache_id=name, cache_ops=edits, keep_graph=rng.random() < 0.05)
        body.state_version = built.version
        built.send(pb.SessionRequest(forward=body), {"hidden_states": hidden})


def huge_strings(built: Sequence) -> None:
    """Names of megabytes, which no answer and no log line should repeat."""
    text = built.rng.choice(("x", "\0", "\x7f", "é", "\U0001f600", "'\"\\"))
    text *= built.rng.choice((1000, 100_000, 2_900_000)) // len(text.encode())
    requests = (
        pb.SessionRequest(backward=pb.Backward(request_id=text)),
        pb.SessionRequest(release=pb.Release(request_ids=[text])),
        pb.SessionRequest(open=pb.Open(weight_digest=text)),
        pb.SessionRequest(open=pb.Open(library_versions={text: text[:1000]})),
        pb.SessionRequest(fetch=pb.Fetch(names=[text])),
        pb.SessionRequest(fetch=pb.Fetch(norm_rows=[text])),
        forward_of([spec([0], name=text)], b""),
        structure_of(pb.Structure(adapters=[pb.AdapterSpec(name=text, peft_type="LORA")])),
        structure_of(pb.Structure(adapters=[pb.AdapterSpec(name="a", peft_type=text)])),
        structure_of(pb.Structure(adapters=[pb.AdapterSpec(
            name="a", peft_type="LORA", target_modules=[text])])),
        structure_of(pb.Structure(adapters=[pb.AdapterSpec(
            name="a", peft_type="LORA", settings={text: pb.Setting(word=text)})])),
        structure_of(pb.Structure(layers=[pb.LayerState(module=text, active=[text])])),
        structure_of(pb.Structure(), [pb.Value(names=[text])]),
        forward_of([spec([1, 1, HIDDEN_SIZE])], bytes(256), adapter_names=[text]),
        forward_of([spec([1, 1, HIDDEN_SIZE])], bytes(256), attention=text),
        forward_of([spec([1, 1, HIDDEN_SIZE])], bytes(256), cache_id=text),
    )  # fmt: skip
    for request in built.rng.sample(requests, 3):
        needs_gradient = request.WhichOneof("body") == "backward"
        gradient = {"gradient": torch.zeros(1, 1, HIDDEN_SIZE)} if needs_gradient else {}
        built.send(request, gradient)


def gigantic_fields(built: Sequence) -> None:
    """Repeated fields with as many entries as fit into a frame."""
    many = built.rng.choice((1000, 100_000, 300_000))
    names, a_matrix = [f"{i}" for i in range(many)], "transformer.h.3.attn.c_attn.weight"
    requests = (
        lambda: pb.SessionRequest(release=pb.Release(request_ids=names)),
        lambda: pb.SessionRequest(fetch=pb.Fetch(names=names)),
        lambda: pb.SessionRequest(fetch=pb.Fetch(norm_rows=[a_matrix] * many)),
        lambda: pb.SessionRequest(backward=pb.Backward(request_id="r0", values=names)),
        lambda: structure_of(pb.Structure(adapters=[pb.AdapterSpec(name=n) for n in names])),
        lambda: structure_of(pb.Structure(adapters=[pb.AdapterSpec(
            name="a", peft_type="LORA", target_modules=names)])),
        lambda: structure_of(pb.Structure(adapters=[pb.AdapterSpec(
            name="a", peft_type="LORA", ranks=dict.fromkeys(names, 1))])),
        lambda: structure_of(pb.Structure(layers=[pb.LayerState(module=n) for n in names])),
        lambda: structure_of(pb.Structure(), [pb.Value(names=[n]) for n in names]),
        lambda: structure_of(pb.Structure(), [pb.Value(names=names)]),
        lambda: forward_of([spec([0], name=n) for n in names], b""),
        lambda: forward_of([pb.TensorSpec() for _ in names], b""),
        lambda: forward_of([spec([1] * many)], b"1234"),
        lambda: forward_of([spec([1, 1, HIDDEN_SIZE])], bytes(256), cache_id="c",
                           cache_ops=[pb.CacheOp(repeat=pb.CacheOp.Repeat(repeats=1))] * many),
    )  # fmt: skip
    built.send(built.rng.choice(requests)())
    built.frames[-1] = built.frames[-1][:MAX_FRAME]


def wrong_order(built: Sequence) -> None:
    """Messages before, after and between those they belong to; ids that repeat or shrink."""
    first = len(built.frames)
    for _ in range(4):
        built.anything()
    if built.rng.random() < 0.4:
        built.open()
    frames = built.frames[first:] if built.rng.random() < 0.8 else built.frames
    built.rng.shuffle(frames)
    built.frames[-len(frames) :] = frames
    for number in (0, 1, 2**64 - 1, 2**63, 5):
        body = pb.SessionRequest(id=number, acknowledged=whole(built.rng))
        body.fetch.SetInParent()
        built.frames.append(body.SerializeToString())


def too_large(built: Sequence) -> None:
    """A frame above the cap."""
    built.frames.append(
        forward_of([], bytes(MAX_FRAME + built.rng.choice((0, 1, 10**6)))).SerializeToString()
    )


_IN_A_SESSION: tuple[Callable[[Sequence], None], ...] = (
    wrong_lengths, vast_shapes, endless_chunks, many_open_messages, odd_values, odd_caches,
    huge_strings, gigantic_fields, wrong_order, too_large, *SETTINGS_CASES,
)  # fmt: skip


def hostile(rng: random.Random) -> Script:
    """A peer with one of the ill intents above, in a session of its own."""
    case = rng.choice(_IN_A_SESSION)
    built = Sequence(rng)
    if rng.random() < 0.95:
        built.open()
    if rng.random() < 0.5:
        built.train_step()
    case(built)
    built.fetch()
    return Script(case.__name__, [Stream(built.frames)])


def outside_a_session(rng: random.Random) -> Script:
    """Calls that are wrong before any message of ours is read."""
    noise = rng.randbytes(rng.choice((0, 1, 20, 5000)))
    built = Sequence(rng)
    built.open()
    bomb = forward_of([], bytes(rng.choice((2, 64, 512)) * 2**20)).SerializeToString()
    big = "x" * rng.choice((100, 7000, 20_000))
    streams = (
        Stream([noise], GET_INFO),
        Stream([b""], GET_INFO),
        Stream([b"\xff\xff"], GET_INFO),
        Stream([bytes(MAX_FRAME + 1)], GET_INFO),
        Stream([b"", b""], GET_INFO),
        Stream([], GET_INFO),
        Stream([noise], "/trunkline.v1.TrunkService/NoSuchMethod"),
        Stream([noise], "/no.such.Service/Method"),
        Stream([noise], "/"),
        Stream([noise], SESSION),
        Stream([b""] * 10, SESSION),
        Stream([], SESSION),
        Stream([*built.frames, bomb], SESSION, gzip=True),
        Stream(built.frames, SESSION, metadata=[("authorization", big), ("x-any", big)]),
    )
    return Script("outside_a_session", [rng.choice(streams)])
