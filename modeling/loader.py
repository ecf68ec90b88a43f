"""From a checkpoint folder to a model, or one rank's shard of it.

Layer by layer: read this rank's slices, pack them, unmap the files. Nothing of the checkpoint is
executed, and only tensors that the architecture names are read (tensors.py says which).
"""

from pathlib import Path

import torch

from modeling.checkpoint.config import ModelConfig, is_arithmetic, load_config
from modeling.checkpoint.dtypes import DTYPES, serving_dtype
from modeling.checkpoint.folder import EMBEDDING, HEAD
from modeling.checkpoint.tensors import tied_name
from modeling.checkpoint.weights import Part, WeightReader
from modeling.families import tensor_names
from modeling.kernels.attention import AttentionKernel
from modeling.kernels.linear import Linear, make_linear
from modeling.model import Model
from modeling.parallel import TensorParallel
from modeling.rope import channel_order
from modeling.transformer import Layer, Transformer, TransformerWeights
from protocol.errors import ConfigError

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}


def load_model(
    path_or_name: str,
    *,
    tp: TensorParallel,
    dtype: str,
    device: str,
    max_model_len: int | None = None,
) -> Model:
    """Load this rank's shard of a model.

    Args:
        path_or_name: a checkpoint folder, or ``arithmetic[:key=value,...]``.
        tp: the rank's tensor-parallel group; its size must divide the model's heads.
        dtype: one of DTYPES, or "auto": see :func:`modeling.checkpoint.dtypes.serving_dtype`.
        device: "cpu" or "cuda[:index]".
        max_model_len: as in :func:`modeling.checkpoint.config.load_config`.

    Raises:
        ConfigError: a checkpoint that is unsupported, incomplete or damaged, or a degree that does
            not divide it.
    """
    config = load_config(path_or_name, max_model_len=max_model_len)
    check_divides(config, tp.size)
    if is_arithmetic(path_or_name):
        from modeling.arithmetic import ArithmeticModel  # the only model that is no transformer

        return ArithmeticModel(config, tp, device)
    name = serving_dtype(dtype, config, device)
    reader = WeightReader(Path(path_or_name), TORCH_DTYPES[name])
    weights = ShardLoader(config, reader, tp, torch.device(device)).load()
    return Transformer(config, weights, tp, make_kernel(device))


def make_kernel(device: str) -> AttentionKernel:
    """The attention of a device; imported here, so that a CPU needs nothing of CUDA's."""
    if torch.device(device).type == "cuda":
        from modeling.kernels.cuda_attention import CudaKernel

        return CudaKernel()
    from modeling.kernels.cpu_attention import CpuKernel

    return CpuKernel()


def check_divides(config: ModelConfig, tp_size: int) -> None:
    """Raise ConfigError unless a tensor-parallel degree divides everything that is sharded."""
    sharded = {
        "attention heads": config.num_heads,
        "KV heads": config.num_kv_heads,
        "FFN columns": tp_size if config.architecture == "arithmetic" else config.intermediate_size,
    }
    for what, count in sharded.items():
        if count % tp_size:
            raise ConfigError(
                f"tp{tp_size} does not divide the model's {count} {what}: choose a degree that does"
            )


class ShardLoader:
    """Reads and packs the shard of one rank."""

    def __init__(
        self, config: ModelConfig, reader: WeightReader, tp: TensorParallel, device: torch.device
    ) -> None:
        self._config = config
        self._reader = reader
        self._tp = tp
        self._device = device
        self._names = tensor_names(config.architecture)

    def load(self) -> TransformerWeights:
        """Everything that the rank holds."""
        config = self._config
        # Where both are stored each is used, though config.json ties them: as in transformers.
        embedding_name = tied_name(EMBEDDING, HEAD, self._reader, config)
        head_name = tied_name(HEAD, EMBEDDING, self._reader, config)
        embedding = self._vocab_rows(embedding_name)
        # A tied head has a second, packed copy: reading it costs less than half in decode.
        source = embedding if head_name == embedding_name else self._vocab_rows(head_name)
        head = make_linear(source, None, self._device)
        del source
        self._reader.release()
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(self._names.layer.format(index)))
            self._reader.release()
        final_norm_D = self._whole(f"{self._names.final_norm}.weight", config.hidden_size)
        self._reader.release()
        return TransformerWeights(embedding.to(self._device), tuple(layers), final_norm_D, head)

    def _layer(self, prefix: str) -> Layer:
        config = self._config
        names = self._names
        query_size = config.num_heads * config.head_dim
        return Layer(
            input_norm_D=self._whole(f"{prefix}.{names.attention_norm}.weight", config.hidden_size),
            qkv=self._qkv(prefix),
            qk_norm=self._qk_norm(prefix) if config.qk_norm else None,
            output=self._row_parallel(
                f"{prefix}.{names.output}", query_size, config.attention_output_bias
            ),
            mlp_norm_D=self._whole(f"{prefix}.{names.mlp_norm}.weight", config.hidden_size),
            gate_up=self._gate_up(prefix),
            down=self._row_parallel(
                f"{prefix}.{names.down}", config.intermediate_size, config.mlp_bias
            ),
        )

    def _qkv(self, prefix: str) -> Linear:
        config = self._config
        order = channel_order(config.head_dim)
        names = self._names
        weights, biases = [], []
        for name, num_heads, rows_order in (
            (names.query, config.num_heads, order),
            (names.key, config.num_kv_heads, order),
            (names.value, config.num_kv_heads, None),  # only what RoPE turns is reordered
        ):
            size = num_heads * config.head_dim
            rows = self._share(size)
            full = f"{prefix}.{name}"
            weights.append(
                Part(f"{full}.weight", (size, config.hidden_size), rows, order=rows_order)
            )
            biases.append(Part(f"{full}.bias", (size,), rows, order=rows_order))
        return self._linear(weights, biases if config.attention_bias else [])

    def _qk_norm(self, prefix: str) -> torch.Tensor:
        config = self._config
        order = channel_order(config.head_dim)
        rows = []
        norms = (
            (self._names.query_norm, config.num_heads),
            (self._names.key_norm, config.num_kv_heads),
        )
        for name, num_heads in norms:
            part = Part(f"{prefix}.{name}.weight", (config.head_dim,), order=order)
            rows.append(self._reader.read([part]).expand(num_heads // self._tp.size, -1))
        return torch.cat(rows).to(self._device)

    def _gate_up(self, prefix: str) -> Linear:
        config = self._config
        size = config.intermediate_size
        rows = self._share(size)
        names = [f"{prefix}.{self._names.gate}", f"{prefix}.{self._names.up}"]
        weights = [Part(f"{name}.weight", (size, config.hidden_size), rows) for name in names]
        biases = [Part(f"{name}.bias", (size,), rows) for name in names]
        return self._linear(weights, biases if config.mlp_bias else [])

    def _row_parallel(self, name: str, in_size: int, has_bias: bool) -> Linear:
        hidden_size = self._config.hidden_size
        columns = self._share(in_size)
        weights = [Part(f"{name}.weight", (hidden_size, in_size), columns=columns)]
        # the all-reduce sums over the ranks: only one may add the bias
        biases = [Part(f"{name}.bias", (hidden_size,))] if has_bias and self._tp.rank == 0 else []
        return self._linear(weights, biases)

    def _linear(self, weights: list[Part], biases: list[Part]) -> Linear:
        bias = self._reader.read(biases) if biases else None
        return make_linear(self._reader.read(weights), bias, self._device)

    def _whole(self, name: str, size: int) -> torch.Tensor:
        return self._reader.read([Part(name, (size,))]).to(self._device)

    def _share(self, size: int) -> slice:
        """This rank's part of a dimension that the degree divides."""
        share = size // self._tp.size
        return slice(self._tp.rank * share, (self._tp.rank + 1) * share)

    def _vocab_rows(self, name: str) -> torch.Tensor:
        """This rank's rows of a vocabulary table; the last ranks may be padded with zeros."""
        config = self._config
        share = -(-config.vocab_size // self._tp.size)
        start = min(self._tp.rank * share, config.vocab_size)
        end = min(start + share, config.vocab_size)
        shape = (config.vocab_size, config.hidden_size)
        if end - start == share:
            return self._reader.read([Part(name, shape, slice(start, end))])
        padded = torch.zeros((share, config.hidden_size), dtype=self._reader.dtype)
        if start < end:
            padded[: end - start] = self._reader.read([Part(name, shape, slice(start, end))])
        return padded
