"""``/v1/completions``: a text worker reads the body (text/completion_body.py), ``Answer`` does the
rest."""

from coordinator.http.answers.answer import Answer
from coordinator.http.answers.shapes import CompletionShape
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.jobs.documents.document import TEXT
from coordinator.text.tasks import NeedsDocument, Prepared, ReadCompletion
from coordinator.validation.bodies import Body


async def complete(frontend: Frontend, context: RequestContext, body: Body) -> Answer:
    """The answer to a completion request.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    workers, tenant = frontend.workers, context.tenant
    task = ReadCompletion(frontend.max_model_len, tenant)
    found = await workers.run(tenant.name, task, body)
    if isinstance(found, NeedsDocument):
        opened = await frontend.open_document(tenant, found.document_id, TEXT, "document_id")
        task = ReadCompletion(frontend.max_model_len, tenant, opened)
        found = await workers.run(tenant.name, task, body)
    assert isinstance(found, Prepared), found
    shape = CompletionShape(
        return_token_ids=found.options.return_token_ids,
        with_logprobs=found.with_logprobs,
        bytes_of=frontend.tokenizer.token_bytes,
    )
    return Answer(frontend, context, found.options, await frontend.choices(context, found), shape)
