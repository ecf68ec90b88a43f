"""How many tokens a document may have."""

from coordinator.jobs.parsing.formats import unprocessable
from protocol.errors import RequestError


def check_size(num_tokens: int, max_tokens: int) -> None:
    """Refuse what can never be held.

    Raises:
        RequestError: naming both numbers.
    """
    if num_tokens == 0:
        raise unprocessable("the document is empty: it has no tokens")
    if num_tokens > max_tokens:
        raise RequestError(
            f"the document has {num_tokens} tokens and this cluster can hold {max_tokens}: "
            f"split it, or serve with more KV memory or a longer context",
            code="document_too_large",
            param="source",
        )
