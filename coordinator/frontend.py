"""What the HTTP routes share: the model that is served, its limits, and the way to an answer.

1. A route validates its body into :class:`Options` and knows how to make token ids of the prompts.
2. ``prepare`` makes them in a tokenizer thread, checks them, and numbers the choices.
3. ``Answer`` submits the choices and speaks to the caller.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request

from coordinator.auth import SCOPE_TENANT, Tenant
from coordinator.config import CoordinatorConfig
from coordinator.control import ControlPlane
from coordinator.generation import Generation
from coordinator.jobs.batches import Batches
from coordinator.jobs.context import Jobs
from coordinator.jobs.files import Files
from coordinator.jobs.questions import Attached
from coordinator.lag import LoopLag
from coordinator.limits import SCOPE_CLIENT_REQUEST_ID, SCOPE_REQUEST_ID
from coordinator.parameters import (
    Options,
    check_token_ids,
    context_exceeded,
    for_prompt,
    mixed_seed,
)
from coordinator.registry import Registry
from coordinator.schemas import UnknownFields
from coordinator.service import Service
from coordinator.tokenizing import Prompt, TextTools, Tokenization, as_prompt
from coordinator.traces import Traces
from modeling.config import ModelConfig
from protocol.errors import RequestError

MAX_SESSION_ID_CHARS = 256
LAG_MEMORY_S = 5.0  # a loop that was late is ready again after so long without being it
MAX_BYTES_PER_TOKEN = 8  # a text longer than this for each token of the context is not tokenized


@dataclass(frozen=True, slots=True)
class Asker:
    """Who sent a request, and its names."""

    tenant: Tenant
    request_id: str
    client_request_id: str
    session_id: str | None
    arrived: float
    priority: int = 0  # of the prefill; 0 is of somebody who waits

    @staticmethod
    def of(request: Request) -> "Asker":
        """From the scope that the middleware has filled.

        Raises:
            RequestError: ``X-Session-ID`` is not plain text.
        """
        session_id = request.headers.get("x-session-id")
        if session_id is not None and not (
            0 < len(session_id) <= MAX_SESSION_ID_CHARS and session_id.isprintable()
        ):
            raise RequestError(
                f"X-Session-ID must be 1 to {MAX_SESSION_ID_CHARS} printable characters",
                code="invalid_value",
                param="session_id",
            )
        return Asker(
            request.scope[SCOPE_TENANT],
            request.scope[SCOPE_REQUEST_ID],
            request.scope[SCOPE_CLIENT_REQUEST_ID],
            session_id,
            time.monotonic(),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a request; ``prompt_number`` counts its prompts."""

    index: int
    prompt_number: int
    generation: Generation
    echoed: str = ""
    attached: Attached | None = None  # the document that its prompt begins with


@dataclass(frozen=True, slots=True)
class Frontend:
    """The coordinator as its routes see it."""

    config: CoordinatorConfig
    model: ModelConfig
    registry: Registry
    control: ControlPlane
    service: Service
    tokenization: Tokenization
    traces: Traces
    lag: LoopLag
    started_at: int  # Unix time
    jobs: Jobs | None = None  # where documents are offered; these two as well
    files: Files | None = None
    batches: Batches | None = None
    unknown_fields: UnknownFields = field(default_factory=UnknownFields)

    @property
    def max_model_len(self) -> int:
        return self.registry.max_model_len(self.config.max_model_len or self.model.max_model_len)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError when ``name`` is given and is not the model that is served."""
        if name is not None and name != self.config.model_name:
            raise RequestError(
                f"the model {name[:64]!r} does not exist here: see /v1/models",
                code="model_not_found",
                param="model",
                status=404,
            )

    def check_ready(self) -> None:
        """Raises RequestError until every pool has served once."""
        if not self.control.complete.is_set():
            raise RequestError("the cluster is starting", code="starting", status=503)

    def unready(self, now: float) -> RequestError | None:
        """Why new work had better go elsewhere; what comes nevertheless is served if it can be."""
        if not self.control.complete.is_set() or not self.registry.serving("decode"):
            return RequestError(self.registry.missing(), code="starting", status=503)
        lag_s = self.lag.largest(now, LAG_MEMORY_S)
        if lag_s > self.config.max_loop_lag_s:
            return RequestError(
                f"the coordinator is overloaded: its event loop was {lag_s:.1f} s late",
                code="overloaded",
                status=503,
            )
        return None

    def check_text(self, text: str, param: str) -> None:
        """Refuse by its length a text that cannot fit, before it costs seconds to tokenize."""
        if len(text.encode("utf-8")) > MAX_BYTES_PER_TOKEN * self.max_model_len:
            at_least = len(text.encode("utf-8")) // MAX_BYTES_PER_TOKEN
            raise context_exceeded(at_least, self.max_model_len, param)

    async def prepare(
        self,
        asker: Asker,
        options: Options,
        encoders: Sequence[Callable[[TextTools], Sequence[int]]],
        param: str,
        attached: Attached | None = None,
    ) -> list[Choice]:
        """Every choice of a request: ``options.num_choices`` for each prompt, in OpenAI's order.

        Raises:
            RequestError: a prompt is empty, too long, or not of the model's tokens.
        """
        most = self.config.limits.max_sequences
        if len(encoders) * options.num_choices > most:
            raise RequestError(
                f"{len(encoders)} prompts with n {options.num_choices} each: at most {most} "
                f"sequences are served in one request",
                code="invalid_value",
                param="n",
            )
        salt = asker.tenant.cache_salt(options.cache_salt)
        if attached is not None:
            salt, attached = attached.salted(salt, is_own=options.cache_salt is not None)
        fingerprint, block_size = self.model.fingerprint, self.config.block_size

        def work(tools: TextTools) -> list[Prompt]:
            return [
                as_prompt(self._checked(encode(tools), param), block_size, fingerprint, salt)
                for encode in encoders
            ]

        prompts = await self.tokenization.run(work)
        session_id = options.session_id or asker.session_id
        choices: list[Choice] = []
        for number, prompt in enumerate(prompts):
            sampling = for_prompt(options, len(prompt.token_ids), self.max_model_len)
            for _ in range(options.num_choices):
                index = len(choices)
                seed = mixed_seed(sampling.seed, index % options.num_choices)
                choices.append(
                    Choice(
                        index,
                        number,
                        Generation(
                            request_id=f"{asker.request_id}-{index}",
                            prompt_token_ids=prompt.token_ids,
                            block_hashes=prompt.block_hashes,
                            sampling=msgspec.structs.replace(sampling, seed=seed),
                            tenant=asker.tenant.name,
                            cache_salt=salt,
                            priority=asker.priority,
                            session=(asker.tenant.name, session_id) if session_id else None,
                        ),
                        attached=attached,
                    )
                )
        return choices

    def _checked(self, token_ids: Sequence[int], param: str) -> tuple[int, ...]:
        if not token_ids:
            raise RequestError("the prompt is empty", code="empty_prompt", param=param)
        if len(token_ids) >= self.max_model_len:
            raise context_exceeded(len(token_ids), self.max_model_len, param)
        return check_token_ids(param, token_ids, self.model.vocab_size)
