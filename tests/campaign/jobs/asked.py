"""What is asked of the jobs, and what must come of it: texts, lines of batches, answers. Pure."""

from typing import Any

BLOCK_SIZE = 16
SEGMENT_TOKENS = 64
SALT = "salt"
TENANT = "tenant"
NUM_LINES = 9
LINE_TEXT = "What a line of a batch makes a document of. " * 4
_SHARED = "The same beginning for many of them; it is as long as a segment. "[:SEGMENT_TOKENS]


def text_of(key: str) -> str:
    """Of the document with this key, a number: some begin alike, by whole segments."""
    number = int(key)
    return _SHARED * (number % 3) + f"{key} and on. " * (5 + number % 30)


def is_shared(key: str) -> bool:
    """Whether another document begins as this one does."""
    return int(key) % 3 > 0


def batch_lines(seed: int, num_lines: int) -> list[dict[str, Any]]:
    """Lines of every kind; those that ask differently are answered differently."""
    lines = []
    for number in range(num_lines):
        url, body = "/v1/completions", {"prompt": [seed % 200 + 1, number + 1], "max_tokens": 3}
        if number % 10 == 3:
            body = {"prompt": [], "max_tokens": 3}  # an error
        if number % 10 == 4:
            url, body = "/v1/documents", {"source": {"text": LINE_TEXT}}
        if number % 10 == 5:
            body["metadata"] = {"after": "a document"}
        lines.append({"custom_id": f"{seed}-{number}", "method": "POST", "url": url, "body": body})
    return lines


def linked_lines(seed: int) -> list[dict[str, Any]]:
    """The same, few, and one more that names the document of another."""
    lines = batch_lines(seed, NUM_LINES)
    document = next(line["custom_id"] for line in lines if line["url"] == "/v1/documents")
    body = {"prompt": [1], "max_tokens": 3, "document_id": f"custom:{document}"}
    asks = {"method": "POST", "url": "/v1/completions", "body": body}
    return [*lines, {"custom_id": f"{seed}-about", **asks}]


def answer_of(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to a completion: a function of what was asked."""
    prompt, document_id = body["prompt"], body.get("document_id")
    if not prompt:
        return 400, {"error": {"code": "invalid_value", "message": "the prompt is empty"}}
    text = f"{sum(prompt) * 7919 % 1009} {document_id or ''}"
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3}
    return 200, {"object": "text_completion", "choices": [{"text": text}], "usage": usage}
