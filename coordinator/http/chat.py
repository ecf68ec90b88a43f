"""``/v1/chat/completions``: a text worker reads the body (text/chat_body.py), ``Answer`` does the
rest."""

from coordinator.http.answers.answer import Answer
from coordinator.http.answers.shapes import ChatShape
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.jobs.documents.document import CHAT
from coordinator.text.tasks import NeedsDocument, Prepared, ReadChat
from coordinator.validation.bodies import Body


async def chat(frontend: Frontend, context: RequestContext, body: Body) -> Answer:
    """The answer to a chat request.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    workers, tenant = frontend.workers, context.tenant
    found = await workers.run(tenant.name, ReadChat(frontend.max_model_len, tenant), body)
    if isinstance(found, NeedsDocument):
        opened = await frontend.open_document(tenant, found.document_id, CHAT, "messages")
        task = ReadChat(frontend.max_model_len, tenant, opened)
        found = await workers.run(tenant.name, task, body)
    assert isinstance(found, Prepared), found
    shape = ChatShape(
        return_token_ids=found.options.return_token_ids,
        with_logprobs=found.with_logprobs,
        bytes_of=frontend.tokenizer.token_bytes,
    )
    return Answer(frontend, context, found.options, await frontend.choices(context, found), shape)
