"""What a checkpoint folder said that decides how it is served: for people, and for the coordinator.

Stop tokens are the union of what three files say: config.json, generation_config.json and the
tokenizer's own end of sequence. A tune that speaks ChatML names ``<|im_end|>`` in the last only.
"""

from pathlib import Path

import msgspec

from modeling.checkpoint.config import ModelConfig, is_arithmetic
from modeling.checkpoint.folder import EMBEDDING, HEAD, read_checkpoint
from modeling.checkpoint.generation_config import FILE_BEFORE as CONFIG
from modeling.checkpoint.generation_config import FILE_NAME as GENERATION_CONFIG
from modeling.checkpoint.generation_config import deciding_file, read_generation_config
from modeling.checkpoint.json_fields import Fields, read_json
from modeling.checkpoint.tensors import check_tensors, tied_name
from modeling.text.chat_template import ChatTemplate
from modeling.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer"
BUILT_IN = "built in"


class StopToken(msgspec.Struct, frozen=True):
    """A token that ends an answer, and every file that says so."""

    token_id: int
    text: str
    sources: tuple[str, ...]


class CheckpointFacts(msgspec.Struct, frozen=True):
    """What was read of a checkpoint, and from where."""

    architecture: str
    stored_dtype: str
    stop_tokens: tuple[StopToken, ...]
    sampling: dict[str, float]  # defaults of requests that name none
    not_followed: tuple[str, ...]  # fields of the same file that would change answers elsewhere
    template: str  # where the chat template is from; "none"
    head: str  # "stored", "tied" or, against config.json, "stored, though tied in config.json"
    unread_tensors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what else is not as somebody might expect
    sampling_from: str = GENERATION_CONFIG


def describe_checkpoint(
    path_or_name: str, model: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> CheckpointFacts:
    """The facts of a checkpoint folder or of the arithmetic model.

    Args:
        path_or_name: the folder or the model's name.
        model: of its config.json and generation_config.json.
        tokenizer: of the folder.
        template: that is used with it.

    Raises:
        ConfigError: a file cannot be read, or the tensors are not those of the model.
    """
    is_built_in = is_arithmetic(path_or_name)
    folder = Path(path_or_name)
    head, unread = (BUILT_IN, ()) if is_built_in else _tensors(folder, model)
    sources = {BUILT_IN: model.eos_token_ids} if is_built_in else _stored_stops(folder)
    sources[TOKENIZER] = tokenizer.eos_token_ids
    return CheckpointFacts(
        architecture=model.architecture,
        stored_dtype=model.dtype,
        stop_tokens=_stop_tokens(sources, model, tokenizer),
        sampling=model.sampling.named(),
        not_followed=model.sampling.not_followed,
        template=template.where,
        head=head,
        unread_tensors=unread,
        notes=_notes(sources, model, tokenizer),
        sampling_from=GENERATION_CONFIG if is_built_in else deciding_file(folder).name,
    )


def with_facts(model: ModelConfig, facts: CheckpointFacts) -> ModelConfig:
    """The model with every stop token."""
    stops = tuple(stop.token_id for stop in facts.stop_tokens)
    return msgspec.structs.replace(model, eos_token_ids=stops)


def _tensors(folder: Path, model: ModelConfig) -> tuple[str, tuple[str, ...]]:
    entries = read_checkpoint(folder)
    unread = check_tensors(entries, model, folder)
    if tied_name(HEAD, EMBEDDING, entries, model) == EMBEDDING:
        return "tied to the embedding", unread
    if tied_name(EMBEDDING, HEAD, entries, model) == HEAD:
        return "stored, and the embedding tied to it", unread
    is_contradiction = model.tie_word_embeddings
    return "stored, though config.json ties it" if is_contradiction else "stored", unread


def _stored_stops(folder: Path) -> dict[str, tuple[int, ...]]:
    config = Fields(read_json(folder / CONFIG), str(folder / CONFIG))
    name = "eos_token_id"
    stops = {CONFIG: config.token_ids(name)}
    return stops | {deciding_file(folder).name: read_generation_config(folder).token_ids(name)}


def _stop_tokens(
    sources: dict[str, tuple[int, ...]], model: ModelConfig, tokenizer: Tokenizer
) -> tuple[StopToken, ...]:
    named: dict[int, list[str]] = {}
    for source, ids in sources.items():
        for token_id in dict.fromkeys(ids):
            if 0 <= token_id < model.vocab_size:
                named.setdefault(token_id, []).append(source)
    return tuple(
        StopToken(token_id, tokenizer.token(token_id) or "", tuple(sources))
        for token_id, sources in named.items()
    )


def _notes(
    sources: dict[str, tuple[int, ...]], model: ModelConfig, tokenizer: Tokenizer
) -> tuple[str, ...]:
    notes = [
        f"{source} names the stop token {token_id}, which is beyond the vocabulary of "
        f"{model.vocab_size}"
        for source, ids in sources.items()
        for token_id in ids
        if token_id >= model.vocab_size
    ]
    beyond = tokenizer.vocab_size - model.vocab_size
    if beyond > 0:
        notes.append(
            f"{beyond} tokens of the tokenizer are beyond the model's vocabulary of "
            f"{model.vocab_size}: a prompt with one is refused"
        )
    return tuple(notes)
