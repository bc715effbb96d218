"""Ways in which people call a model, by name; each returns numbers to compare two models by.

A way leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Way = Callable[[Any], torch.Tensor]
WAYS: dict[str, Way] = {}

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def _way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def ids(tokens: int = 7, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (rows, tokens), generator=generator)


def padded(tokens: int = 7, rows: int = 2) -> dict[str, torch.Tensor]:
    """The same, the first row's first three tokens being padding."""
    given = ids(tokens, rows)
    mask = torch.ones_like(given)
    mask[0, :3] = given[0, :3] = 0
    return {"input_ids": given, "attention_mask": mask}


def base(model: Any) -> Any:
    """The family's model, without PEFT's around it."""
    return model.get_base_model()


def block(model: Any, index: int) -> Any:
    """A block by its number; 2 and 3 are the trunk's."""
    names = (f".h.{index}", f".layers.{index}")
    return next(m for n, m in model.named_modules() if n.endswith(names))


def gradients(model: Any) -> torch.Tensor:
    """All gradients in a row; the model then has none."""
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def loss_of(model: Any, given: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """A training loss."""
    given = ids() if given is None else given
    loss: torch.Tensor = model(input_ids=given, labels=given, **{"use_cache": False} | more).loss
    return loss


def embeddings(model: Any, tokens: int = 7, rows: int = 2) -> torch.Tensor:
    """Token embeddings, a leaf."""
    made: torch.Tensor = base(model).get_input_embeddings()(ids(tokens, rows))
    return made.detach()


def dynamic(model: Any) -> DynamicCache:
    """An empty cache."""
    return DynamicCache(config=base(model).config)


def static(model: Any, length: int = 40) -> StaticCache:
    """An empty cache of fixed size."""
    return StaticCache(config=base(model).config, max_cache_len=length)


def generated(model: Any, **more: Any) -> torch.Tensor:
    """Greedy tokens of a padded prompt."""
    tokens: torch.Tensor = model.generate(**padded() | GREEDY | more)
    return tokens


@torch.no_grad()
def _decoded(model: Any, cache: Any, first: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a prompt and of three tokens, by hand."""
    mask = first.get("attention_mask")
    output = model(**first, past_key_values=cache, use_cache=True)
    found = [output.logits[:, -1:]]
    for _ in range(3):
        token, more = output.logits[:, -1:].argmax(-1), {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            more["attention_mask"] = mask
        output = model(input_ids=token, past_key_values=cache, **more)
        found.append(output.logits)
    return torch.cat(found, 1)


# Caches


@_way
def static_cache_by_generate(model: Any) -> torch.Tensor:
    plain = model.generate(ids(), cache_implementation="static", **GREEDY)
    return torch.cat([plain, generated(model, cache_implementation="static")])


@_way
def static_cache_and_beams(model: Any) -> torch.Tensor:
    return generated(model, cache_implementation="static", num_beams=3)


@_way
def hybrid_cache(model: Any) -> torch.Tensor:
    return generated(model, cache_implementation="hybrid")


@_way
def sliding_cache(model: Any) -> torch.Tensor:
    return generated(model, cache_implementation="sliding_window")


@_way
def static_cache_of_the_generation_config(model: Any) -> torch.Tensor:
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    model.generation_config.cache_implementation = "static"
    try:
        return generated(model)
    finally:
        model.generation_config = before


@_way
def static_cache_by_hand(model: Any) -> torch.Tensor:
    return _decoded(model, static(model), {"input_ids": ids()})


@_way
def static_cache_by_hand_with_padding(model: Any) -> torch.Tensor:
    return _decoded(model, static(model), padded(14))


@_way
def static_cache_used_again(model: Any) -> torch.Tensor:
    cache = static(model)
    one = generated(model, past_key_values=cache)
    cache.reset()
    other = model.generate(**padded(6), past_key_values=cache, **GREEDY)
    return torch.cat([one, other], 1)


@_way
def static_cache_with_a_mask_over_all_slots(model: Any) -> torch.Tensor:
    mask = torch.zeros(2, 40, dtype=torch.long)
    mask[:, :7] = 1
    with torch.no_grad():
        output = model(input_ids=ids(), attention_mask=mask, past_key_values=static(model))
    logits: torch.Tensor = output.logits
    return logits


@_way
def dynamic_cache_by_hand(model: Any) -> torch.Tensor:
    return _decoded(model, dynamic(model), padded(14))


@_way
def dynamic_cache_without_a_configuration(model: Any) -> torch.Tensor:
    return _decoded(model, DynamicCache(), {"input_ids": ids(14)})


def _prompt_cache(model: Any, cache: Any) -> torch.Tensor:
    prompt = ids(5, 1)
    with torch.no_grad():
        cache = model(input_ids=prompt, past_key_values=cache, use_cache=True).past_key_values
    found = []
    for seed in (1, 2):
        given = torch.cat([prompt, ids(4, 1, seed)], 1)
        again = copy.deepcopy(cache)
        found.append(model.generate(given, past_key_values=again, **GREEDY))
    return torch.cat(found, 1)


@_way
def prompt_cache(model: Any) -> torch.Tensor:
    return _prompt_cache(model, dynamic(model))


@_way
def static_prompt_cache(model: Any) -> torch.Tensor:
    return _prompt_cache(model, static(model))


@_way
@torch.no_grad()
def copied_cache_outlives_the_original(model: Any) -> torch.Tensor:
    cache = dynamic(model)
    model(input_ids=ids(5, 1), past_key_values=cache, use_cache=True)
    fork = copy.deepcopy(cache)
    del cache
    gc.collect()
    model(input_ids=ids(3, 1, 9), use_cache=False)
    logits: torch.Tensor = model(input_ids=ids(3, 1, 5), past_key_values=fork).logits
    return logits


@_way
@torch.no_grad()
def cache_cropped_repeated_selected_reset(model: Any) -> torch.Tensor:
    cache = dynamic(model)
    cache.activate_past_recording()
    model(input_ids=ids(7, 1), past_key_values=cache, use_cache=True)
    cache.crop(-3)
    cache.batch_repeat_interleave(3)
    found = [model(input_ids=ids(2, 3, 5), past_key_values=cache).logits]
    cache.batch_select_indices(torch.tensor([2, 0]))
    found.append(model(input_ids=ids(2, 2, 6), past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([1, 0]))
    found.append(model(input_ids=ids(1, 2, 7), past_key_values=cache).logits)
    cache.reset()
    found.append(model(input_ids=ids(3, 2, 5), past_key_values=cache).logits)
    return torch.cat([logits.flatten() for logits in found])


@_way
@torch.no_grad()
def lengths_of_a_cache(model: Any) -> torch.Tensor:
    found = []
    for cache in (dynamic(model), static(model)):
        model(input_ids=ids(7, 1), past_key_values=cache, use_cache=True)
        asked = [int(cache.get_seq_length(i)) for i in range(len(cache.layers))]
        found += [len(cache), cache.get_max_length(), cache.is_compileable, *cache.is_sliding]
        found += [*asked, *(n for i in range(5) for n in cache.get_mask_sizes(1, i))]
    return torch.tensor([int(number) for number in found])


@_way
def a_cache_goes_on_after_generate(model: Any) -> torch.Tensor:
    output = model.generate(ids(5, 1), return_dict_in_generate=True, **GREEDY)
    given = torch.cat([output.sequences, ids(2, 1, 4)], 1)
    tokens: torch.Tensor = model.generate(given, past_key_values=output.past_key_values, **GREEDY)
    return tokens


@_way
def trained_through_a_cache_filled_without_gradients(model: Any) -> torch.Tensor:
    cache = dynamic(model)
    with torch.no_grad():
        model(input_ids=ids(5), past_key_values=cache, use_cache=True)
    loss_of(model, ids(4), past_key_values=cache).backward()
    return gradients(model)


@_way
def cache_filled_with_gradients_goes_on(model: Any) -> torch.Tensor:
    found = []
    for cache in (dynamic(model), static(model)):
        output = model(input_ids=ids(5), labels=ids(5), past_key_values=cache, use_cache=True)
        with torch.no_grad():
            found += [model(input_ids=ids(n), past_key_values=cache).logits for n in (4, 1, 1)]
        if isinstance(cache, StaticCache):
            break  # it is written in place, so that its own graph is lost
        output.loss.backward()
    return torch.cat([*(logits.flatten() for logits in found), gradients(model)])


@_way
@torch.no_grad()
def keys_of_a_cache(model: Any) -> torch.Tensor:
    cache = dynamic(model)
    model(input_ids=ids(7, 1), past_key_values=cache, use_cache=True)
    again = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    logits: torch.Tensor = model(input_ids=ids(2, 1, 5), past_key_values=again).logits
    return logits


@_way
@torch.no_grad()
def masks_longer_and_shorter_than_the_tokens(model: Any) -> torch.Tensor:
    found = []
    for first, second in ((9, 12), (7, 6), (5, 10)):
        cache = dynamic(model)
        mask = torch.ones(2, 12, dtype=torch.long)
        for count, given in ((first, ids()), (second, ids(3))):
            output = model(input_ids=given, attention_mask=mask[:, :count], past_key_values=cache)
            found.append(output.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def _changed_between_tokens(model: Any, change: Callable[[], Any]) -> torch.Tensor:
    cache = dynamic(model)
    found = [model(input_ids=ids(), past_key_values=cache, use_cache=True).logits[:, -1:]]
    found.append(model(input_ids=ids(1), past_key_values=cache).logits)
    change()
    found += [model(input_ids=ids(1), past_key_values=cache).logits for _ in range(2)]
    return torch.cat(found, 1)


@_way
def adapter_switched_between_tokens(model: Any) -> torch.Tensor:
    tuner = model.base_model
    found = _changed_between_tokens(model, tuner.disable_adapter_layers)
    return torch.cat([found, _changed_between_tokens(model, tuner.enable_adapter_layers)])


@_way
def scaling_changed_between_tokens(model: Any) -> torch.Tensor:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.scaling["default"] for layer in layers]

    def scale() -> None:
        for layer in layers:
            layer.scale_layer(3.0)

    found = _changed_between_tokens(model, scale)
    for layer, kept in zip(layers, before, strict=True):
        layer.scaling["default"] = kept
    return found


@_way
def adapter_written_between_tokens(model: Any) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]

    def write() -> None:
        for parameter in trained:
            parameter.mul_(2.0)

    found = _changed_between_tokens(model, write)
    with torch.no_grad():
        for parameter, kept in zip(trained, before, strict=True):
            parameter.copy_(kept)
    return found


@_way
def adapter_data_written_between_tokens(model: Any) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]

    def write() -> None:  # as averages of weights do it
        for parameter in trained:
            parameter.data.copy_(2 * parameter.data)

    found = _changed_between_tokens(model, write)
    for parameter, kept in zip(trained, before, strict=True):
        parameter.data = kept
    return found


@_way
def hook_inside_a_block_between_tokens(model: Any) -> torch.Tensor:
    hooks: list[Any] = []

    def hook() -> None:
        hooks.append(block(model, 3).mlp.register_forward_hook(lambda *given: given[2] * 0))

    try:
        return _changed_between_tokens(model, hook)
    finally:
        for one in hooks:
            one.remove()


@_way
def layer_replaced_between_tokens(model: Any) -> torch.Tensor:
    one = block(model, 3)
    plain = one.mlp
    try:
        return _changed_between_tokens(model, lambda: setattr(one, "mlp", nn.Identity()))
    finally:
        one.mlp = plain


@_way
@torch.no_grad()
def cropped_cache_is_copied(model: Any) -> torch.Tensor:
    cache = dynamic(model)
    cache.activate_past_recording()
    model(input_ids=ids(7, 1), past_key_values=cache, use_cache=True)
    cache.crop(-3)
    fork = copy.deepcopy(cache)
    found = [model(input_ids=ids(2, 1, n), past_key_values=c).logits for n, c in ((5, fork),)]
    found.append(model(input_ids=ids(2, 1, 6), past_key_values=cache).logits)
    return torch.cat(found, 1)


@_way
def cache_without_gradients_that_nobody_wants(model: Any) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        cache = dynamic(model)
        found = [model(input_ids=ids(), past_key_values=cache, use_cache=True).logits]
        found += [model(input_ids=ids(1), past_key_values=cache).logits for _ in range(2)]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return torch.cat(found, 1)


# Generation


@_way
def early_exit(model: Any) -> torch.Tensor:
    config = base(model).config
    depth = config.num_hidden_layers
    try:
        tokens: torch.Tensor = model.generate(ids(9, 1), assistant_early_exit=3, **GREEDY)
        return tokens
    finally:
        config.num_hidden_layers = depth


@_way
def greedy(model: Any) -> torch.Tensor:
    return generated(model)


@_way
def sampling(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return generated(model, do_sample=True, top_k=20, temperature=0.9)


@_way
def beams(model: Any) -> torch.Tensor:
    return generated(model, num_beams=4, num_return_sequences=2)


@_way
def sampled_beams(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return generated(model, num_beams=3, do_sample=True)


@_way
def prompt_lookup(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids(9, 1).repeat(1, 2), prompt_lookup_num_tokens=3, **GREEDY
    )
    return tokens


@_way
def assisted_by_itself(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids(9, 1), assistant_model=base(model), **GREEDY)
    return tokens


@_way
def chunked_prefill(model: Any) -> torch.Tensor:
    return generated(model, **padded(12), prefill_chunk_size=5)


@_way
def constrained(model: Any) -> torch.Tensor:
    def allowed(row: int, tokens: torch.Tensor) -> list[int]:
        return [int(tokens[-1]) % 400 + 5, int(tokens[0]) % 300 + 3, 77]

    return generated(model, prefix_allowed_tokens_fn=allowed)


@_way
def penalties(model: Any) -> torch.Tensor:
    return generated(
        model, repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=[[5], [7]]
    )


@_way
def guidance(model: Any) -> torch.Tensor:
    return generated(model, guidance_scale=1.5)


class _Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@_way
def streamed(model: Any) -> torch.Tensor:
    heard = _Heard()
    model.generate(ids(5, 1), streamer=heard, **GREEDY)
    return torch.tensor(heard.tokens)


@_way
def scores(model: Any) -> torch.Tensor:
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output: Any = generated(model, **how)
    return torch.stack(output.scores + output.logits).nan_to_num()


@_way
def hidden_states_of_generate(model: Any) -> torch.Tensor:
    how = {"return_dict_in_generate": True, "output_hidden_states": True}
    output: Any = generated(model, **how)
    return torch.cat([state.flatten() for step in output.hidden_states for state in step])


@_way
def without_a_cache(model: Any) -> torch.Tensor:
    return generated(model, use_cache=False)


@_way
def generated_from_embeddings(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(inputs_embeds=embeddings(model), **GREEDY)
    return tokens


@_way
def continuous_batching(model: Any) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    found = model.generate_batch([row.tolist() for row in ids()], generation_config=config)
    return torch.tensor([one.generated_tokens for one in found.values()])


# Graphs


@_way
@torch.no_grad()
def hidden_states(model: Any) -> torch.Tensor:
    return torch.stack(model(**padded(14), output_hidden_states=True).hidden_states)


@_way
def gradients_of_hidden_states(model: Any) -> torch.Tensor:
    states = model(**padded(), output_hidden_states=True, use_cache=False).hidden_states
    states[3].retain_grad()
    sum(state.pow(2).mean() for state in states).backward()
    return torch.cat([gradients(model), states[3].grad.flatten()])


@_way
@torch.no_grad()
def attentions(model: Any) -> torch.Tensor:
    before = base(model).config._attn_implementation
    base(model).set_attn_implementation("eager")
    try:
        return torch.stack(model(**padded(), output_attentions=True).attentions)
    finally:
        base(model).set_attn_implementation(before)


@_way
@torch.no_grad()
def other_answers(model: Any) -> torch.Tensor:
    found = [
        model(**padded(), return_dict=False)[0],
        model(**padded(), logits_to_keep=2).logits,
        model(**padded(), logits_to_keep=torch.tensor([1, 3])).logits,
        model(input_ids=ids(1, 1)).logits,
        model(input_ids=ids(), position_ids=torch.arange(3, 10).expand(2, -1)).logits,
        model(**padded() | {"attention_mask": padded()["attention_mask"].float()}).logits,
        model(input_ids=ids(), attention_mask=torch.ones(2, 7, 7).tril().bool()[:, None]).logits,
    ]
    return torch.cat([logits.flatten() for logits in found])


@_way
def inference_mode(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(**padded()).logits
    return logits.clone()


@_way
def from_embeddings(model: Any) -> torch.Tensor:
    given = embeddings(model).requires_grad_(True)
    model(inputs_embeds=given, labels=ids()).loss.backward()
    assert given.grad is not None
    return torch.cat([gradients(model), given.grad.flatten()])


@contextlib.contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that has derivatives of every kind."""
    before = base(model).config._attn_implementation
    base(model).set_attn_implementation("eager")
    try:
        yield
    finally:
        base(model).set_attn_implementation(before)
        model.zero_grad()


@_way
def second_derivative_by_grad(model: Any) -> torch.Tensor:
    given = embeddings(model).requires_grad_(True)
    with _eager(model):
        loss = model(inputs_embeds=given, labels=ids(), use_cache=False).loss
        (first,) = torch.autograd.grad(loss, given, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), given)[0]


@_way
def second_derivative_by_backward(model: Any) -> torch.Tensor:
    given = embeddings(model).requires_grad_(True)
    with _eager(model):
        loss = model(inputs_embeds=given, labels=ids(), use_cache=False).loss
        loss.backward(create_graph=True)
        first, given.grad = given.grad, None
        assert first is not None
        first.pow(2).sum().backward()
        assert given.grad is not None
        return given.grad


@_way
def forward_mode(model: Any) -> torch.Tensor:
    given = embeddings(model)
    with _eager(model), forward_ad.dual_level():
        dual = forward_ad.make_dual(given, torch.ones_like(given))
        output = model(inputs_embeds=dual, use_cache=False).logits
        tangent: torch.Tensor = forward_ad.unpack_dual(output).tangent
        return tangent


@_way
def transform_of_functions(model: Any) -> torch.Tensor:
    def summed(given: torch.Tensor) -> Any:
        return model(inputs_embeds=given, use_cache=False).logits.sum()

    found: torch.Tensor = torch.func.grad(summed)(embeddings(model))
    return found


@_way
def several_gradients_at_once(model: Any) -> torch.Tensor:
    given = embeddings(model, 3, 1).requires_grad_(True)
    logits = model(inputs_embeds=given, use_cache=False).logits[0, -1, :3]
    return torch.autograd.grad(logits, given, torch.eye(3), is_grads_batched=True)[0]


@_way
def jacobian(model: Any) -> torch.Tensor:
    def last(given: torch.Tensor) -> Any:
        return model(inputs_embeds=given, use_cache=False).logits[0, -1, :3]

    found: torch.Tensor = torch.autograd.functional.jacobian(last, embeddings(model, 3, 1))
    return found


@_way
def two_backwards(model: Any) -> torch.Tensor:
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


@_way
def several_forwards_before_one_backward(model: Any) -> torch.Tensor:
    torch.stack([loss_of(model, ids(7, 2, seed)) for seed in range(3)]).sum().backward()
    return gradients(model)


def _checkpointed(model: Any, **how: Any) -> torch.Tensor:
    model.train()
    model.gradient_checkpointing_enable(how)
    base(model).enable_input_require_grads()
    try:
        loss_of(model).backward()
    finally:
        model.gradient_checkpointing_disable()
        base(model).disable_input_require_grads()
        model.eval()
    return gradients(model)


@_way
def gradient_checkpointing(model: Any) -> torch.Tensor:
    return _checkpointed(model, use_reentrant=False)


@_way
def reentrant_gradient_checkpointing(model: Any) -> torch.Tensor:
    return _checkpointed(model, use_reentrant=True)


@_way
def checkpoint_around_the_model(model: Any) -> torch.Tensor:
    given = embeddings(model).requires_grad_(True)

    def loss(given: torch.Tensor) -> Any:
        return model(inputs_embeds=given, labels=ids(), use_cache=False).loss

    checkpoint(loss, given, use_reentrant=False).backward()
    assert given.grad is not None
    return torch.cat([gradients(model), given.grad.flatten()])


@_way
def autocast(model: Any) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
        tokens = generated(model)
    loss.backward()
    return torch.cat([loss.detach()[None], gradients(model), tokens.flatten().float()])


@_way
def functional_call(model: Any) -> torch.Tensor:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = {n: (p.detach() + 0.01).requires_grad_() for n, p in trained.items()}
    how = {"input_ids": ids(), "labels": ids(), "use_cache": False}
    loss = torch.func.functional_call(model, given, kwargs=how).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(given.values()))])


@_way
def compiled(model: Any) -> torch.Tensor:
    torch._dynamo.reset()
    made: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        logits = made(input_ids=ids()).logits
    loss_of(made).backward()
    torch._dynamo.reset()
    return torch.cat([gradients(model), logits.flatten()])


@_way
def compiled_with_a_static_cache(model: Any) -> torch.Tensor:
    torch._dynamo.reset()
    inner = base(model)
    inner.forward = torch.compile(inner.forward, backend="eager")
    try:
        return generated(model, cache_implementation="static")
    finally:
        del inner.forward
        torch._dynamo.reset()


@_way
@torch.no_grad()
def unknown_keyword(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids(), something_unknown=3).logits
    return logits


# What is done to blocks and layers


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids()).logits
    return logits


@_way
def hook_that_looks_at_a_block(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = block(model, 3).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    try:
        _logits(model)
    finally:
        hook.remove()
    return seen[0]


@_way
def hook_that_changes_a_block(model: Any) -> torch.Tensor:
    hooks = [
        block(model, 3).register_forward_hook(lambda _, __, output: output * 1.5),
        block(model, 2).register_forward_pre_hook(lambda _, given: (given[0] * 1.5, *given[1:])),
    ]
    try:
        return torch.cat([_logits(model).flatten(), generated(model).flatten().float()])
    finally:
        for hook in hooks:
            hook.remove()


@_way
def backward_hook_on_a_block(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = block(model, 3).register_full_backward_hook(lambda _, __, out: seen.append(out[0]))
    try:
        loss_of(model).backward()
    finally:
        hook.remove()
    return torch.cat([seen[0].flatten(), gradients(model)])


@_way
def block_with_a_forward_of_its_own(model: Any) -> torch.Tensor:
    one = block(model, 3)
    plain = one.forward
    one.forward = lambda hidden, *args, **kwargs: hidden + 0.5 * plain(hidden, *args, **kwargs)
    try:
        return torch.cat([_logits(model).flatten(), generated(model).flatten().float()])
    finally:
        del one.forward


@_way
def block_left_out(model: Any) -> torch.Tensor:
    one = block(model, 3)
    one.forward = lambda hidden, *args, **kwargs: hidden
    try:
        return _logits(model)
    finally:
        del one.forward


@_way
def block_called_by_itself(model: Any) -> torch.Tensor:
    _logits(model)
    given: dict[str, Any] = {}
    hook = block(model, 3).register_forward_pre_hook(
        lambda _, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    _logits(model)
    hook.remove()
    with torch.no_grad():
        output: torch.Tensor = block(model, 3)(*given["args"], **given["kwargs"])
    return output


def _layers(model: Any) -> tuple[Any, str]:
    inner = base(model).base_model
    return inner, "h" if hasattr(inner, "h") else "layers"


class _Skipped(nn.Module):
    attention_type = "full_attention"

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


def _with_layers(model: Any, change: Callable[[list[Any]], list[Any]]) -> torch.Tensor:
    inner, name = _layers(model)
    before = getattr(inner, name)
    setattr(inner, name, nn.ModuleList(change(list(before))))
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids(), use_cache=False).logits
        return logits
    finally:
        setattr(inner, name, before)


@_way
def first_of_the_trunk_s_blocks_replaced(model: Any) -> torch.Tensor:
    return torch.cat(
        [
            _with_layers(model, lambda all_: [*all_[:1], _Skipped(), *all_[2:]]),
            _with_layers(model, lambda all_: [*all_[:2], _Skipped(), *all_[3:]]),
        ]
    )


@_way
def blocks_cut_off_and_exchanged(model: Any) -> torch.Tensor:
    return torch.cat(
        [
            _with_layers(model, lambda all_: all_[:3]),
            _with_layers(model, lambda all_: [*all_[:2], all_[3], all_[2], *all_[4:]]),
            _with_layers(model, lambda all_: [*all_[:3], all_[2], *all_[3:]]),
        ]
    )


@_way
def fewer_layers_by_the_configuration(model: Any) -> torch.Tensor:
    config = base(model).config
    before, config.num_hidden_layers = config.num_hidden_layers, 3
    try:
        with torch.no_grad():
            found = [model(input_ids=ids(), use_cache=cached).logits for cached in (False, True)]
    finally:
        config.num_hidden_layers = before
    return torch.cat(found)


def _other_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"attention_mask": torch.eye(7).bool()[None, None].expand(2, -1, -1, -1)}


@_way
def mask_of_one_block(model: Any) -> torch.Tensor:
    one = block(model, 3)
    if hasattr(one, "attn"):  # GPT-2's comes by its place

        def change(_: Any, args: Any, kwargs: Any) -> Any:
            return (*args[:2], _other_mask({})["attention_mask"], *args[3:]), kwargs
    else:

        def change(_: Any, args: Any, kwargs: Any) -> Any:
            return args, _other_mask(kwargs)

    hook = one.register_forward_pre_hook(change, with_kwargs=True)
    try:
        return _logits(model)
    finally:
        hook.remove()


@_way
def mask_by_a_hook_on_the_base_model(model: Any) -> torch.Tensor:
    mask = padded()["attention_mask"]
    inner, _ = _layers(model)
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
    )
    try:
        found = _logits(model)
    finally:
        hook.remove()
    plain = inner.forward
    inner.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": mask})
    try:
        return torch.cat([found, _logits(model)])
    finally:
        del inner.forward


@_way
def a_call_in_a_hook(model: Any) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def ask(*_: Any) -> None:
        if not found:
            found.append(torch.zeros(0))
            found.append(_logits(model).flatten())

    hook = block(model, 3).register_forward_hook(ask)
    try:
        found.append(_logits(model).flatten())
    finally:
        hook.remove()
    return torch.cat(found)


@_way
def blocks_called_after_a_forward_that_failed(model: Any) -> torch.Tensor:
    def stop(*_: Any) -> None:
        raise StopIteration

    given: dict[str, Any] = {}
    hook = block(model, 3).register_forward_pre_hook(
        lambda _, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    other = block(model, 4).register_forward_hook(stop)
    with torch.no_grad(), contextlib.suppress(StopIteration):
        model(**padded())
    hook.remove()
    other.remove()
    with torch.no_grad():
        output: torch.Tensor = block(model, 3)(*given["args"], **given["kwargs"])
    return output


class _Answering(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: torch.Tensor) -> Any:
        return self.model(input_ids=given, use_cache=False).logits


@_way
def traced(model: Any) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.jit.trace(_Answering(model), ids(), check_trace=False)
    logits: torch.Tensor = made(ids())
    return logits


@_way
def attention_of_one_s_own(model: Any) -> torch.Tensor:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        output, weights = plain(*args, **kwargs)
        return output * 0.5, weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        return _logits(model)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def _lora(model: Any) -> Any:
    return next(module for module in block(model, 3).modules() if isinstance(module, LoraLayer))


@_way
def dropout_of_an_adapter_replaced(model: Any) -> torch.Tensor:
    layer = _lora(model)
    plain = layer.lora_dropout["default"]
    layer.lora_dropout["default"] = nn.Tanh()
    try:
        return _logits(model)
    finally:
        layer.lora_dropout["default"] = plain


class _Variant(LoraVariant):
    @staticmethod
    def forward(module: Any, active: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> Any:
        return result + 1


@_way
def variant_of_an_adapter(model: Any) -> torch.Tensor:
    layer = _lora(model)
    layer.lora_variant["default"] = _Variant()
    try:
        return _logits(model)
    finally:
        del layer.lora_variant["default"]


@_way
def merged(model: Any) -> torch.Tensor:
    for merge in (model.merge_adapter, model.merge_and_unload):
        try:
            merge()
        except Exception:
            layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
            assert layers and not any(layer.merged for layer in layers)
            raise
    return torch.zeros(1)


@_way
def hook_inside_a_block(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = block(model, 3).mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        _logits(model)
    finally:
        hook.remove()
    return seen[0]


@_way
def hook_on_every_module(model: Any) -> torch.Tensor:
    names: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    try:
        _logits(model)
    finally:
        hook.remove()
    return torch.tensor(len(names))


@_way
def layer_with_a_forward_of_its_own(model: Any) -> torch.Tensor:
    one = block(model, 3).mlp
    plain = one.forward
    one.forward = lambda *args: plain(*args) * 0
    try:
        return _logits(model)
    finally:
        del one.forward


def _patched(made: Any, model: Any) -> torch.Tensor:
    plain = made.forward
    # As a decorator does: it takes the name of what it replaces.
    patched: Any = lambda self, *args, **kwargs: plain(self, *args, **kwargs) * 0  # noqa: E731
    patched.__module__ = plain.__module__
    made.forward = patched
    try:
        return _logits(model)
    finally:
        made.forward = plain


@_way
def class_of_layers_with_another_forward(model: Any) -> torch.Tensor:
    return _patched(type(block(model, 3).mlp), model)


@_way
def layer_of_another_class(model: Any) -> torch.Tensor:
    one = block(model, 3).mlp
    name = "act" if hasattr(one, "act") else "act_fn"
    plain = getattr(one, name)
    setattr(one, name, nn.ReLU())
    try:
        return _logits(model)
    finally:
        setattr(one, name, plain)


@_way
def layer_added(model: Any) -> torch.Tensor:
    one = block(model, 3)
    one.more = nn.Linear(4, 4)
    try:
        return _logits(model)
    finally:
        del one.more


@_way
def layer_taken_out(model: Any) -> torch.Tensor:
    one = block(model, 3)
    plain, one.mlp = one.mlp, nn.Identity()
    try:
        return _logits(model)
    finally:
        one.mlp = plain


@_way
def attribute_of_a_layer(model: Any) -> torch.Tensor:
    norm = next(m for n, m in block(model, 3).named_modules() if n.startswith(("ln_1", "input_la")))
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    plain = getattr(norm, name)
    setattr(norm, name, 0.5)
    try:
        return _logits(model)
    finally:
        setattr(norm, name, plain)


@_way
def window_of_the_configuration(model: Any) -> torch.Tensor:
    config = base(model).config
    had, before = "sliding_window" in config.__dict__, getattr(config, "sliding_window", None)
    config.sliding_window = 3
    try:
        return _logits(model)
    finally:
        config.sliding_window = before
        if not had:
            del config.sliding_window
