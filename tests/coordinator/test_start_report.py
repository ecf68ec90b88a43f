"""The report at the start: everything that decides how requests are answered, in a dozen lines."""

import msgspec

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.http.start_report import PoolMemory, StartReport, make_report, render
from modeling.facts import CheckpointFacts, StopToken

CONFIG = CoordinatorConfig(
    token="t",
    model="/models/tune",
    pools=(ExpectedPool("decode0", "decode", 1, 1),),
    served_model_names=("a", "b"),
    kv_dtype="bfloat16",
    kv_memory_from="--kv-memory 1GiB",
)
FACTS = CheckpointFacts(
    architecture="llama",
    stored_dtype="float16",
    stop_tokens=(
        StopToken(2, "</s>", ("config.json", "generation_config.json")),
        StopToken(7, "<|im_end|>", ("tokenizer",)),
    ),
    sampling={"temperature": 0.6, "top_k": 20},
    not_followed=("num_beams",),
    template="/models/tune/chat_template.jinja",
    head="stored, though config.json ties it",
    unread_tensors=("model.layers.8.x", "model.layers.9.x"),
    notes=("one", "two", "three", "four"),
)
POOLS = (
    PoolMemory("prefill0", "prefill", 1 << 30, 5000),
    PoolMemory("decode0", "decode", 1 << 29, 900),
    PoolMemory("store0", "store", 1 << 20, 10),
)


def _report(config: CoordinatorConfig = CONFIG, facts: CheckpointFacts = FACTS) -> StartReport:
    return make_report(config, facts, POOLS, 901)


def test_it_says_everything_in_a_dozen_lines() -> None:
    assert render(_report()) == [
        "  model:         /models/tune (llama), named a, b",
        "  dtype:         bfloat16, from weights in float16 (--dtype float16 keeps them)",
        "  stop tokens:   </s> 2 (config.json, generation_config.json), <|im_end|> 7 (tokenizer)",
        "  sampling:      temperature 0.6, top_k 20 (generation_config.json); without effect: "
        "num_beams",
        "  chat template: /models/tune/chat_template.jinja",
        "  output head:   stored, though config.json ties it",
        "  not read:      model.layers.*.x (2)",
        "  KV memory:     prefill0 1 GiB a rank, 5000 tokens, decode0 512 MiB a rank, 900 tokens, "
        "store0 1 MiB a rank, 10 tokens (--kv-memory 1GiB)",
        "  context:       901 tokens are promised, 901 fit for one request",
        "  note:          one",
        "  note:          two",
        "  note:          three",
    ]


def test_it_goes_over_the_wire_as_it_is() -> None:
    report = _report()
    assert msgspec.json.decode(msgspec.json.encode(report), type=StartReport) == report


def test_what_is_plain_is_short() -> None:
    plain = msgspec.structs.replace(
        FACTS, stop_tokens=(), sampling={}, not_followed=(), unread_tensors=(), notes=()
    )
    config = msgspec.structs.replace(CONFIG, kv_dtype="float16")
    lines = render(_report(config, plain))
    assert "  dtype:         float16" in lines
    assert "  stop tokens:   none: answers end at max_tokens or a stop string" in lines
    assert "  sampling:      temperature 1" in lines
    assert len(lines) == 8
    none = render(_report(msgspec.structs.replace(CONFIG, generation_config="none")))
    assert "  sampling:      temperature 1 (--generation-config none)" in none
