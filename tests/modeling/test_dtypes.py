"""In which dtype a checkpoint is served: its own where the device has it, and never silently."""

import msgspec
import pytest

from modeling.checkpoint.config import load_config
from modeling.checkpoint.dtypes import serving_dtype
from protocol.errors import ConfigError

ARITHMETIC = load_config("arithmetic")


@pytest.mark.parametrize(
    ("stored", "device", "served"),
    [
        ("float32", "cpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float16", "cpu", "bfloat16"),
        ("float32", "cuda:0", "bfloat16"),
        ("bfloat16", "cuda", "bfloat16"),
        ("float16", "cuda", "float16"),
    ],
)
def test_auto(stored: str, device: str, served: str) -> None:
    model = msgspec.structs.replace(ARITHMETIC, architecture="llama", dtype=stored)
    assert serving_dtype("auto", model, device) == served
    for asked in ("float32", "bfloat16", "float16"):
        assert serving_dtype(asked, model, device) == asked
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of auto, bfloat16, float16"):
        serving_dtype("int8", model, device)


def test_the_arithmetic_model_is_exact_in_one_only() -> None:
    assert serving_dtype("auto", ARITHMETIC, "cpu") == "float32"
    with pytest.raises(ConfigError, match="exact in float32 only"):
        serving_dtype("float16", ARITHMETIC, "cpu")
