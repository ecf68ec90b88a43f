"""The weights of the embedded model: a Llama of two layers in which every head has a known job.

1. The embedding of a word holds codes: what it is (``text``), what its successors are recognised by
   (``match`` the next, ``again`` the one after), what it means (``domain``, ``office``, ``place``),
   and for the fixed words of an answer the word that follows (``out``).
2. Layer 0, five heads: two look at the word before and at the second before, the others at the
   latest domain, office and place word of the sentence. The end of a sentence counts as all three,
   and means none; a word that needs no domain counts as that of none. So every word of a value
   knows what it is the value of.
3. Layer 1, one head: from the end of a question, or from a word of the answer, to the word of the
   document with the same keys and the same predecessors; the ``text`` found there goes ``out``.
   When no word has the keys, the head rests on the first token instead.
4. Layer 1, one neuron: where an answer starts, ``The`` if something was found, else ``I``.

Scores are in nats. They are so far apart that what is not meant gets no attention at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modeling.embedded.lexicon import (
    ALONE,
    DOMAINS,
    OFFICES,
    SPECIAL_TOKENS,
    concept_words,
    place_names,
)
from tests.embedded.builder.codes import spread
from tests.embedded.builder.kernels import (
    HEAD_DIM,
    NUM_FREQUENCIES,
    NUM_PAIRS,
    REACH,
    Floats,
    Kernel,
    exactly,
    recency,
)
from tests.embedded.builder.vocabulary import BOUNDARIES, NEWLINE, SPACE, Vocabulary

HIDDEN = 192
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, FFN = 2, 6, 2, 32
SIZES = {
    "one": 1, "text": 44, "match": 12, "again": 8, "domain": 4, "office": 5, "place": 12,
    "has_domain": 1, "has_office": 1, "has_place": 1, "resets": 1, "is_bos": 1,
    "is_assistant": 1, "starts_value": 1, "is_mark": 1,
    "before": 12, "before_again": 8, "second": 8,
    "its_domain": 4, "its_office": 5, "its_place": 12,
    "out": 44, "found": 1, "balance": 1,
}  # fmt: skip
CONCEPTS = ("domain", "office", "place")
GATHERED = (  # by head of layer 0: what it carries from where it looks, and what that becomes
    (("match", "before"), ("again", "before_again")),
    (("again", "second"),),
    (("domain", "its_domain"),),
    (("office", "its_office"),),
    (("place", "its_place"),),
)
LOOKED_UP = (  # by the head of layer 1: what asks, and what is compared with it
    ("match", "before"),
    ("before_again", "second"),
    ("its_domain", "its_domain"),
    ("its_office", "its_office"),
    ("its_place", "its_place"),
)
STARTERS = (SPACE + "is", ":")  # a value follows
NOT_AGAIN = (f"{SPACE}answer", "<|end|>")  # before the start of a value: tells nothing about it
TERMINATORS = (",", ";", NEWLINE, *BOUNDARIES)  # an answer ends with a full stop instead
MARKS = (*TERMINATORS, *".?!", "<|end|>")  # no value starts with one
FIXED = (  # each word of an answer that is not copied, and the word that it is followed by
    ("The", f"{SPACE}answer"),
    (f"{SPACE}answer", f"{SPACE}is"),
    ("I", f"{SPACE}do"),
    (f"{SPACE}do", f"{SPACE}not"),
    (f"{SPACE}not", f"{SPACE}know"),
    (f"{SPACE}know", "."),
    (".", "<|end|>"),
)

ONE = 10.0  # the constant, large so that the norm of a row hardly depends on the rest
EMBEDDING_NORM = 12.0
FOLLOWER = 4.0  # how much louder a fixed word is than a copied one
WEIGHT = {  # of equal keys
    "match": 600.0, "before_again": 200.0,
    "its_domain": 250.0, "its_office": 250.0, "its_place": 300.0,
}  # fmt: skip
REST_ALWAYS, REST_AT_START = 900.0, 440.0  # scores of the first token; the second is added
LOUDNESS = 40.0  # logit of a copied word
END_LOGIT = 12.0  # of <|end|> when there is nothing to say
GATE = 20.0


@dataclass(frozen=True)
class Codes:
    """Unit vectors of tokens and of concepts; ``none`` is that of no domain."""

    text: torch.Tensor
    match: torch.Tensor
    again: torch.Tensor
    domain: torch.Tensor
    office: torch.Tensor
    place: torch.Tensor

    @property
    def none(self) -> torch.Tensor:
        return self.domain[-1]


def train_codes(vocabulary: Vocabulary, seed: int) -> Codes:
    """All codes from one seed. The last dimension of ``match`` is that of STARTERS alone."""
    count = len(vocabulary.tokens)
    match = torch.zeros(count, SIZES["match"])
    match[:, :-1] = spread(count, SIZES["match"] - 1, seed + 1)
    for token in STARTERS:
        match[vocabulary.ids[token]] = torch.nn.functional.one_hot(
            torch.tensor(SIZES["match"] - 1), SIZES["match"]
        ).float()
    again = spread(count, SIZES["again"], seed + 5)
    again[[vocabulary.ids[token] for token in NOT_AGAIN]] = 0.0
    return Codes(
        text=spread(count, SIZES["text"], seed),
        match=match,
        again=again,
        domain=spread(len(DOMAINS) + 1, SIZES["domain"], seed + 2),
        office=spread(len(OFFICES) + len(ALONE), SIZES["office"], seed + 3),
        place=spread(len(place_names()), SIZES["place"], seed + 4),
    )


class Circuit:
    """Builds the tensors of the checkpoint, by the names that Hugging Face gives them."""

    def __init__(self, vocabulary: Vocabulary, codes: Codes) -> None:
        self._vocabulary = vocabulary
        self._codes = codes
        starts = torch.cumsum(torch.tensor([0, *SIZES.values()]), 0).tolist()
        self._at = {
            name: slice(start, start + size)
            for (name, size), start in zip(SIZES.items(), starts, strict=False)
        }
        assert starts[-1] <= HIDDEN

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, in float32."""
        norm = EMBEDDING_NORM / HIDDEN**0.5  # undoes RMSNorm, so that rows are read as written
        later = (EMBEDDING_NORM**2 + 5.5) ** 0.5 / HIDDEN**0.5
        tensors = {
            "model.embed_tokens.weight": self._embedding(),
            "lm_head.weight": self._head(),
            "model.norm.weight": torch.full((HIDDEN,), later),
        }
        for layer, (attention, scale) in enumerate(
            [(self._gathering(), norm), (self._lookup(), later)]
        ):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.self_attn.{n}.weight": w for n, w in attention.items()}
            tensors |= {f"{prefix}.mlp.{n}.weight": w for n, w in self._mlp(layer).items()}
            tensors[f"{prefix}.input_layernorm.weight"] = torch.full((HIDDEN,), scale)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.full((HIDDEN,), later)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    # -- in and out --------------------------------------------------------------------------------

    def _embedding(self) -> torch.Tensor:
        codes, ids, at = self._codes, self._vocabulary.ids, self._at
        rows = torch.zeros(len(ids), HIDDEN)
        rows[:, at["one"]] = ONE
        rows[:, at["text"]] = codes.text
        rows[:, at["match"]] = codes.match
        rows[:, at["again"]] = codes.again
        for name, token_id, code in self._meanings():
            rows[token_id, at[name]] = code
            rows[token_id, at[f"has_{name}"]] = 1.0
        bos, _, system, user, assistant = (ids[token] for token in SPECIAL_TOKENS)
        resets = [ids[token] for token in (*BOUNDARIES, NEWLINE)] + [bos, system, user]
        rows[resets, at["resets"]] = 1.0
        rows[resets, at["domain"]] = codes.none
        rows[bos, at["is_bos"]] = 1.0
        rows[bos, at["text"]] = rows[bos, at["match"]] = rows[bos, at["again"]] = 0.0
        rows[assistant, at["is_assistant"]] = 1.0
        rows[[assistant, *(ids[token] for token in STARTERS)], at["starts_value"]] = 1.0
        rows[[ids[token] for token in TERMINATORS], at["text"]] = codes.text[ids["."]]
        rows[[ids[token] for token in MARKS], at["is_mark"]] = 1.0
        for token, follower in FIXED:
            rows[ids[token], at["out"]] = FOLLOWER * codes.text[ids[follower]]
        missing = EMBEDDING_NORM**2 - rows.square().sum(1)
        assert bool((missing > 0).all())
        rows[:, at["balance"]] = missing.sqrt()[:, None]
        return rows

    def _meanings(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        codes, spellings = self._codes, self._vocabulary.spellings
        domains, offices = list(DOMAINS), [*OFFICES, *ALONE]
        for word, concept in concept_words().items():
            for token_id in spellings(word):
                if concept in DOMAINS:
                    yield "domain", token_id, codes.domain[domains.index(concept)]
                else:
                    yield "office", token_id, codes.office[offices.index(concept)]
                if concept in ALONE:
                    yield "domain", token_id, codes.none
        for index, name in enumerate(place_names()):
            for token_id in spellings(name):
                yield "place", token_id, codes.place[index]

    def _head(self) -> torch.Tensor:
        rows = torch.zeros(len(self._vocabulary.tokens), HIDDEN)
        rows[:, self._at["out"]] = LOUDNESS * self._codes.text
        rows[self._vocabulary.ids["<|end|>"], self._at["one"]] = END_LOGIT / ONE
        return rows

    # -- layer 0 -----------------------------------------------------------------------------------

    def _gathering(self) -> dict[str, torch.Tensor]:
        """Heads 0 and 1 look back one and two words, 2 to 4 for a domain, an office, a place."""
        at, content = self._at, _content_rows()
        flags = ("has_domain", "has_office", "has_place", "resets")
        latest = recency(slope=6.0, margin=15.0)
        near = latest.scores(_ends(0.0, REACH))
        candidate = float(near[0] - near[1]) + 20.0  # outweighs any distance within reach
        query = torch.zeros(NUM_HEADS, HEAD_DIM, HIDDEN)
        for head in (0, 1):
            _set_kernel(query[head], at["one"], exactly(head + 1, margin=25.0))
        for head, concept in enumerate(CONCEPTS, 2):
            _set_kernel(query[head], at["one"], latest)
            query[head][content[flags.index(f"has_{concept}")], at["one"]] = candidate / ONE
            resets = query[head][content[flags.index("resets")]]
            resets[at["one"]] = candidate / ONE
            resets[at["resets"]] = -2.0 * candidate  # the end of a sentence still belongs to it
        key = torch.zeros(HEAD_DIM, HIDDEN)
        key[:NUM_FREQUENCIES, at["one"]] = 1.0 / ONE
        for row, flag in zip(content, flags, strict=False):
            key[row, at[flag]] = 1.0
        value, places = self._carry(("match", "again", *CONCEPTS))
        output = torch.zeros(NUM_HEADS, HIDDEN, HEAD_DIM)
        for head, parts in enumerate(GATHERED):
            for name, target in parts:
                output[head, at[target], places[name]] = torch.eye(SIZES[name])
        return _attention(query, key, value, output)

    def _carry(self, names: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, slice]]:
        """A value projection that carries these parts of a row, and where in the head they lie."""
        value, places, end = torch.zeros(HEAD_DIM, HIDDEN), {}, 0
        for name in names:
            places[name] = slice(end, end + SIZES[name])
            value[places[name], self._at[name]] = torch.eye(SIZES[name])
            end += SIZES[name]
        return value, places

    # -- layer 1 -----------------------------------------------------------------------------------

    def _lookup(self) -> dict[str, torch.Tensor]:
        at, content, codes = self._at, _content_rows(), self._codes
        query = torch.zeros(NUM_HEADS, HEAD_DIM, HIDDEN)
        key = torch.zeros(HEAD_DIM, HIDDEN)
        rest, end = content[0], 1  # the loudest, so in the pair that turns least
        rows: dict[str, list[int]] = {}
        for asks, holds in LOOKED_UP:
            size = SIZES[asks]
            rows[asks] = content[end : end + size]
            end += size
            query[0, rows[asks], at[asks]] = WEIGHT[asks] * torch.eye(size)
            key[rows[asks], at[holds]] = torch.eye(size)
        ids = self._vocabulary.ids
        as_start = codes.match[ids[STARTERS[0]]] - codes.match[ids["<|assistant|>"]]
        query[0, rows["match"], at["is_assistant"]] = WEIGHT["match"] * as_start[:, None]
        key[rows["its_domain"], at["is_bos"]] = -codes.none[:, None]
        key[rows["match"][-1], at["is_mark"]] = -1.0  # even behind a word that starts one
        query[0, rest, at["one"]] = REST_ALWAYS / ONE
        query[0, rest, at["starts_value"]] = REST_AT_START
        key[rest, at["is_bos"]] = 1.0
        value, places = self._carry(("text",))
        found = places["text"].stop
        value[found, at["one"]] = 1.0 / ONE
        value[found, at["is_bos"]] = -2.0
        output = torch.zeros(NUM_HEADS, HIDDEN, HEAD_DIM)
        output[0, at["out"], places["text"]] = torch.eye(SIZES["text"])
        output[0, at["found"], found] = 1.0
        return _attention(query, key, value, output)

    def _mlp(self, layer: int) -> dict[str, torch.Tensor]:
        gate, up = torch.zeros(FFN, HIDDEN), torch.zeros(FFN, HIDDEN)
        down = torch.zeros(HIDDEN, FFN)
        if layer == 1:
            ids, text = self._vocabulary.ids, self._codes.text
            gate[0, self._at["is_assistant"]] = GATE
            up[0, self._at["found"]] = 1.0
            down[self._at["out"], 0] = FOLLOWER / GATE * (text[ids["The"]] - text[ids["I"]])
        return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def _ends(first: float, last: float) -> Floats:
    return torch.tensor([first, last], dtype=torch.float64).numpy()


def _content_rows() -> list[int]:
    """Rows of a head whose pairs turn by less than 0.1 radians over all distances."""
    return [row for pair in range(NUM_PAIRS - 1, 10, -1) for row in (pair, pair + NUM_PAIRS)]


def _set_kernel(query: torch.Tensor, one: slice, kernel: Kernel) -> None:
    for pair in range(NUM_FREQUENCIES):
        query[pair, one] = float(kernel.cosines[pair]) / ONE
        query[pair + NUM_PAIRS, one] = -float(kernel.sines[pair]) / ONE


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Projections in Hugging Face's form; keys and values are the same for all KV heads."""
    return {
        "q_proj": (query * HEAD_DIM**0.5).reshape(NUM_HEADS * HEAD_DIM, HIDDEN),
        "k_proj": key.repeat(NUM_KV_HEADS, 1),
        "v_proj": value.repeat(NUM_KV_HEADS, 1),
        "o_proj": output.permute(1, 0, 2).reshape(HIDDEN, NUM_HEADS * HEAD_DIM),
    }
