"""The dtype in which a model is served. Torch-free: the launcher decides it for all ranks."""

from modeling.checkpoint.config import ARITHMETIC, ModelConfig
from protocol.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")


def serving_dtype(asked: str, model: ModelConfig, device: str) -> str:
    """The dtype of weights, activations and KV.

    "auto" is the checkpoint's own, with two exceptions: a CPU computes float16 weights in bfloat16,
    for which it has instructions, and CUDA those in float32. Any dtype can be asked for.

    Args:
        asked: "auto" or one of DTYPES.
        model: what is served.
        device: "cpu" or "cuda[:index]".

    Raises:
        ConfigError: there is no such dtype, or the model is exact in another only.
    """
    if asked not in ("auto", *DTYPES):
        raise ConfigError(f"dtype {asked!r} is not one of auto, {', '.join(DTYPES)}")
    if model.architecture == ARITHMETIC:
        if asked not in ("auto", "float32"):
            raise ConfigError(f"--dtype {asked}: the arithmetic model is exact in float32 only")
        return "float32"
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        return "float16" if model.dtype == "float16" else "bfloat16"
    return "bfloat16" if model.dtype == "float16" else model.dtype
