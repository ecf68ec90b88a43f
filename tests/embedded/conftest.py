"""The embedded model in one process, its prompt computed in one pool and its answer in another."""

from collections.abc import Sequence

import pytest
import torch

from kvcache.pool import KVPool
from kvtransfer.plan import plan
from kvtransfer.transport.interface import ReadState
from modeling.embedded import CHECKPOINT
from modeling.loader import load_model
from modeling.paged import PagedAttention, PagedSequence
from modeling.parallel import SingleRank
from modeling.text.chat_template import ChatTemplate, encode_chat
from modeling.text.template_sources import load_chat_template
from modeling.text.tokenizer import Tokenizer, load_tokenizer
from protocol.kv import KVLayout, RankEndpoint
from tests.kvtransfer.local_transport import LocalFabric, LocalTransport

BLOCK_SIZE = 16
NUM_BLOCKS = 256
MAX_ANSWER_TOKENS = 40


class RequestContext:
    """Prefill in a source pool, every block read by a transport, decode in a target pool."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(str(CHECKPOINT))
        self.template: ChatTemplate = load_chat_template(
            str(CHECKPOINT), self.tokenizer.special_tokens
        )
        self._model = load_model(str(CHECKPOINT), tp=SingleRank(), dtype="auto", device="cpu")
        config = self._model.config
        layout = KVLayout(
            num_layers=config.num_layers,
            num_blocks=NUM_BLOCKS,
            num_kv_heads_total=config.num_kv_heads,
            tp_rank=0,
            tp_size=1,
            block_size=BLOCK_SIZE,
            head_dim=config.head_dim,
            dtype="float32",
        )
        self._source, self.target = KVPool(layout), KVPool(layout)

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return encode_chat(self.template, self.tokenizer, messages)

    def ask(self, text: str) -> str:
        """The answer to one message, all of whose KV was moved."""
        prompt = self.prompt([{"role": "user", "content": text}])
        self.prefill(prompt)
        self.move(prompt)
        return self.decode(prompt)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        self._forward(self._source, prompt, 0)

    def move(self, prompt: list[int]) -> None:
        """What a decode rank does: read the blocks of the prompt's full ones and of its last."""
        fabric = LocalFabric()
        source, target = (LocalTransport(name, fabric) for name in ("source", "target"))
        source.start(self._source)
        target.start(self.target)
        layout = self._source.layout
        endpoint = RankEndpoint(0, 0, 0, "source", "", layout, source.name, b"", 0)
        target.connect(endpoint)
        pairs = [(block, block) for block in range(-(-len(prompt) // BLOCK_SIZE))]
        runs = plan(layout, self.target.layout, range(layout.num_layers), pairs)
        handle = target.read("source", runs)
        assert target.poll(handle) is ReadState.DONE
        source.close()
        target.close()

    @torch.inference_mode()
    def decode(self, prompt: list[int]) -> str:
        """Greedily, from the prompt's last token on; its KV and all before are in the target."""
        answer: list[int] = []
        last, position = prompt[-1], len(prompt) - 1
        while len(answer) < MAX_ANSWER_TOKENS:
            logits = self._forward(self.target, [last], position)
            last, position = int(logits.argmax()), position + 1
            if last in self.tokenizer.eos_token_ids:
                break
            answer.append(last)
        return self.tokenizer.decode(answer)

    def _forward(self, pool: KVPool, token_ids: list[int], start: int) -> torch.Tensor:
        table = torch.arange(NUM_BLOCKS, dtype=torch.int32)
        sequence = PagedSequence(start, len(token_ids), table)
        model = self._model
        hidden = model.forward(
            torch.tensor(token_ids),
            torch.arange(start, start + len(token_ids)),
            PagedAttention(pool, model.kernel, model.config, [sequence]),
        )
        return model.logits(hidden[-1:])[0]


@pytest.fixture(scope="session")
def context() -> RequestContext:
    return RequestContext()
