"""``/v1/completions`` and ``/v1/chat/completions``: a text worker reads the body (validation/), and
:class:`Answer` does the rest."""

import msgspec

from coordinator.http.answers.answer import Answer
from coordinator.http.answers.shapes import ChatShape, CompletionShape, Shape
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.jobs.documents.document import CHAT, TEXT
from coordinator.text.tasks import NeedsDocument, Prepared, ReadChat, ReadCompletion
from coordinator.validation.bodies import Body

# By path: who reads the body, the form of answers, the form of a document that it may name, and the
# field that names one.
_READERS: dict[str, tuple[type[ReadChat | ReadCompletion], type[Shape], str, str]] = {
    "/v1/completions": (ReadCompletion, CompletionShape, TEXT, "document_id"),
    "/v1/chat/completions": (ReadChat, ChatShape, CHAT, "messages"),
}
PATHS = tuple(_READERS)


async def generate(frontend: Frontend, context: RequestContext, path: str, body: Body) -> Answer:
    """The answer to a request for tokens.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    read, shape, form, param = _READERS[path]
    workers, tenant = frontend.workers, context.tenant
    task = read(frontend.max_model_len, tenant)
    found = await workers.run(tenant.name, task, body)
    if isinstance(found, NeedsDocument):
        opened = await frontend.open_document(tenant, found.document_id, form, param)
        task = msgspec.structs.replace(task, opened=opened)
        found = await workers.run(tenant.name, task, body)
    assert isinstance(found, Prepared), found
    return Answer(
        frontend,
        context,
        found,
        shape(
            return_token_ids=found.options.return_token_ids,
            with_logprobs=found.options.sampling.num_logprobs is not None,
            bytes_of=frontend.tokenizer.token_bytes,
        ),
    )
