"""The families of models that the native transformer computes, one file each; see family.py."""

from modeling.families.family import Family, TensorNames
from modeling.families.llama import LLAMA
from modeling.families.mistral import MISTRAL
from modeling.families.qwen2 import QWEN2
from modeling.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "TensorNames", "tensor_names"]

# By the class in transformers, as ``architectures`` of a config.json has it.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
_BY_NAME = {family.name: family for family in FAMILIES.values()}


def tensor_names(architecture: str) -> TensorNames:
    """The names of the tensors of a family, by ``ModelConfig.architecture``."""
    return _BY_NAME[architecture].names
