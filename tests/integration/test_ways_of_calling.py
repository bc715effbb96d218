"""Every way of calling a model, split and whole: the same numbers, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from shared.errors import TrunklineError
from tests.conftest import Daemon
from tests.models import save_tiny_model
from tests.ways_of_calling import WAYS

Start = Callable[..., Daemon]

REFUSED = {
    "trained_through_a_cache_filled_without_gradients": "gradients do not pass a cache",
    "keys_of_a_cache": "keys and values of the trunk's blocks are not here",
    "continuous_batching": "continuous batching needs the caches",
    "attentions": "attentions",
    "second_derivative_by_grad": "second order",
    "second_derivative_by_backward": "second order",
    "forward_mode": "forward-mode derivatives",
    "transform_of_functions": r"transforms of torch\.func",
    "several_gradients_at_once": "several gradients at once",
    "unknown_keyword": "something_unknown given to the trunk's blocks",
    "block_called_by_itself": "block 3 of the trunk was called by itself",
    "hook_inside_a_block_between_tokens": "3.mlp was given a hook",
    "layer_replaced_between_tokens": "3.mlp was replaced",
    "mask_of_one_block": "of block 3 was changed on its way",
    "blocks_called_after_a_forward_that_failed": "block 3 of the trunk was called by itself",
    "traced": "are not traced",
    "attention_of_one_s_own": "the attention 'sdpa' was replaced by tests.ways_of_calling.",
    "dropout_of_an_adapter_replaced": "keeps other values outside its parameters",
    "variant_of_an_adapter": "keeps other values outside its parameters",
    "merged": "an adapter is not merged into a split model",
    "hook_inside_a_block": "3.mlp was given a hook",
    "hook_on_every_module": "a global forward hook",
    "layer_with_a_forward_of_its_own": "3.mlp was given a forward of its own",
    "class_of_layers_with_another_forward": "mlp was given the forward of",
    "layer_of_another_class": "was replaced by a torch.nn.modules.activation.ReLU",
    "layer_added": "3.more was added",
    "layer_taken_out": "3.mlp was replaced",
    "attribute_of_a_layer": "was set to 0.5",
    "window_of_the_configuration": "config.sliding_window was changed to 3",
}
ALL = ("gpt2", "llama")
MASKS = ("mistral", "qwen2", "gemma2", "gpt_neox")
"""Families whose masks or blocks differ; of the ways, those that hang on that."""
OF_MASKS = [n for n in WAYS if "cache" in n or "hidden" in n or "hook_that" in n or "chunk" in n]
NOT_BY_GPT2 = ("early_exit", "fewer_layers_by_the_configuration")
"""Of which transformers' own GPT-2 fails."""
CASES = [(f, way) for f in ALL for way in WAYS if f != "gpt2" or way not in NOT_BY_GPT2]
CASES += [(family, way) for family in MASKS for way in OF_MASKS]


@pytest.fixture(scope="module")
def pairs(
    trunkd: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """The split and the whole model of a family, with one adapter."""
    made: dict[str, tuple[Any, Any]] = {}

    def pair(family: str) -> tuple[Any, Any]:
        if family not in made:
            folder = save_tiny_model(family, tmp_path_factory.mktemp(family) / "model")
            split = "2:10" if family == "gpt2" else "1:4"
            address = trunkd("--model", str(folder), "--split", split).address
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=4,
                target_modules=r".*\.(c_attn|c_fc|q_proj|up_proj|query_key_value)",
                init_lora_weights=False,
                fan_in_fan_out=family == "gpt2",
            )
            torch.manual_seed(1)
            plain = AutoModelForCausalLM.from_pretrained(folder)
            whole = get_peft_model(plain, copy.deepcopy(config)).eval()
            torch.manual_seed(1)
            made[family] = (
                SplitModelForCausalLM.from_pretrained(folder, address, peft_config=config).eval(),
                whole,
            )
        return made[family]

    yield pair
    for split, _ in made.values():
        split.remote_trunk.close()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.torch.jit")
@pytest.mark.parametrize(("family", "way"), CASES, ids=[f"{f}-{w}" for f, w in CASES])
def test_it_is_the_whole_model_s_or_refused(
    pairs: Callable[[str], tuple[Any, Any]], family: str, way: str
) -> None:
    split, whole = pairs(family)
    if way in REFUSED:
        with pytest.raises(TrunklineError, match=REFUSED[way]):
            WAYS[way](split)
    else:
        ours, theirs = WAYS[way](split), WAYS[way](whole)
        assert ours.shape == theirs.shape and ours.numel()
        assert float((ours.float() - theirs.float()).abs().max()) <= 1e-5
    # Whatever happened, the next call is right.
    given = torch.arange(5, 12)[None]
    with torch.no_grad():
        ours, theirs = split(input_ids=given).logits, whole(input_ids=given).logits
    assert float((ours - theirs).abs().max()) <= 1e-5
