"""One HTTP answer, from submitting its choices to the last byte, or to the caller's going away.

1. All choices are submitted; their tokens arrive in one :class:`Delivery`.
2. Whole: everything is gathered, then sent. Streamed: headers wait for the first token for a
   moment, so that an early failure still is a plain error with a status; then event by event, with
   a comment when nothing has happened for a while.
3. ``gather`` is the same for a line of a batch, whose answer is not sent.
4. A caller who disconnects, or reads nothing, ends the answer; in every case what still runs of it
   is aborted, in one place.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.errors import error_object, error_response
from coordinator.http.answers import sse
from coordinator.http.answers.sending import body_messages
from coordinator.http.answers.shapes import Choice, Header, Shape, cache_miss_of, usage_of
from coordinator.http.connections.connection import SCOPE_ABORT
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.loop.slices import Pace
from coordinator.loop.timeouts import patient
from coordinator.loop.turns import Lane
from coordinator.request import Request
from coordinator.requests.delivery import Delivery
from coordinator.requests.traces import Trace
from coordinator.text.tasks import Prepared
from coordinator.text.tokenizing import Prompt
from coordinator.text.tokens import ChoiceText, TextDelta
from coordinator.validation.parameters import mixed_seed
from modeling.text.parsers.deltas import Content, Delta, Reasoning
from protocol.errors import RequestError
from protocol.messages import NewToken
from protocol.request import FinishReason

GATHERED_TOKENS = 64  # of a whole answer, that are made JSON in one go

Arrivals = list[tuple[int, Sequence[NewToken]]]


class _ReaderGone(Exception):
    """The caller has taken nothing for too long."""


class Answer(Response):
    """The answer to one request, as Starlette calls it. Used once."""

    def __init__(
        self, frontend: Frontend, context: RequestContext, prepared: Prepared, shape: Shape
    ) -> None:
        super().__init__()
        self._frontend = frontend
        self._context = context
        self._prepared = prepared
        self._options = prepared.options
        self._shape = shape
        self._header = Header(context.request_id, int(time.time()), frontend.config.model_name)
        self._delivery = Delivery()
        self._choices: list[Choice] = []

    async def gather(self) -> tuple[int, dict[str, Any]]:
        """Status and body, sent to nobody. Cancelling it ends the answer."""
        try:
            await self._submit()
            return 200, await self._whole()
        except RequestError as error:
            return error.status, error_object(error)
        finally:
            self._abort()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._answer(scope, send))
        watcher = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await self._frontend.turns.take(Lane.ANSWERS)  # callers go away together, too
        finally:
            for task in (work, watcher):
                if not task.done():
                    task.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        with suppress(asyncio.CancelledError):
            await work

    async def _answer(self, scope: Scope, send: Send) -> None:
        try:
            await self._submit()
            if self._options.stream:
                await self._send_stream(send)
            else:
                await self._send_whole(send)
        except RequestError as error:  # nothing has been sent yet
            await self._send_error(send, error)
        except _ReaderGone:
            abort = scope.get(SCOPE_ABORT)
            if abort is not None:
                abort()
        finally:
            self._abort()

    def _abort(self) -> None:
        for choice in self._choices:
            self._frontend.service.abort(choice.request, time.monotonic())

    async def _submit(self) -> None:
        """Submit every choice, in OpenAI's order: ``n`` for each prompt."""
        await self._frontend.turns.take(Lane.NEW)
        service, prepared = self._frontend.service, self._prepared
        trace = Trace(
            request_id=self._context.request_id,
            client_request_id=self._context.client_request_id,
            tenant=self._context.tenant.name,
            model=self._header.model,
            created=self._header.created,
            num_sequences=len(prepared.prompts) * self._options.num_choices,
        )
        service.check_room(trace.tenant, trace.num_sequences, time.monotonic())
        self._frontend.traces.add(trace)
        for number, packed in enumerate(prepared.prompts):
            prompt = packed.unpacked()
            for _ in range(self._options.num_choices):
                choice = self._choice(number, prompt)
                service.submit(choice.request, time.monotonic(), self._context.arrived)
                self._choices.append(choice)
                trace.requests.append(choice.request)
                await self._frontend.turns.take(Lane.NEW)

    def _choice(self, prompt_number: int, prompt: Prompt) -> Choice:
        prepared, options, context = self._prepared, self._options, self._context
        index, session_id = len(self._choices), options.session_id or context.session_id
        sampling = prepared.samplings[prompt_number]
        seed = mixed_seed(sampling.seed, index % options.num_choices)
        request = Request(
            request_id=f"{context.request_id}-{index}",
            prompt_token_ids=prompt.token_ids,
            block_hashes=prompt.block_hashes,
            sampling=msgspec.structs.replace(sampling, seed=seed),
            tenant=context.tenant.name,
            receiver=self._delivery,
            choice=index,
            cache_salt=prepared.salt,
            session=(context.tenant.name, session_id) if session_id else None,
            priority=context.priority,
        )
        parsing, form = prepared.parsing, self._frontend.format
        stream = self._frontend.tokenizer.stream(
            skip_special_tokens=options.skip_special_tokens,
            continuing=self._shape.continues_prompt,
            kept=form.special_tokens if parsing is not None else (),
        )
        parser = None
        if parsing is not None:
            parser = form.parser(
                prompt=parsing.prompt_end,
                tools=parsing.tools,
                id_seed=request.request_id,
                buffer_calls=not options.stream,
            )
        return Choice(
            request=request,
            text=ChoiceText(stream, options.text),
            parser=parser,
            prompt_number=prompt_number,
            echoed=prepared.echoed[prompt_number] if prepared.echoed else "",
            attached=prepared.attached,
            prompt_json=msgspec.Raw(prepared.prompts[prompt_number].json),
        )

    async def _arrivals(self, timeout_s: float | None = None) -> Arrivals:
        """What has come for the caller, when it is this answer's turn."""
        arrivals = await self._delivery.take(timeout_s)
        await self._frontend.turns.take(Lane.ANSWERS)
        return arrivals

    def _take(self, arrivals: Arrivals) -> Iterator[tuple[Choice, TextDelta]]:
        for index, tokens in arrivals:
            choice = self._choices[index]
            if choice.text.finish_reason is not None:
                continue  # arrived after its stop string
            piece = choice.text.push(tokens)
            choice.num_tokens += len(piece.tokens)
            self._frontend.metrics.num_output_tokens += len(piece.tokens)
            choice.unsent.extend(piece.tokens)
            if piece.finish_reason is not None:
                choice.stop_reason = piece.stop_reason
                now = time.monotonic()
                self._frontend.service.abort(choice.request, now, reason=FinishReason.STOP)
            yield choice, piece

    def _parsed(self, choice: Choice, piece: TextDelta) -> list[Delta]:
        """What a piece of an answer is: its text, or what the model's format makes of it."""
        if choice.parser is None or self._prepared.parsing is None:
            return [Content(piece.text)] if piece.text else []
        deltas = choice.parser.push(piece.text)
        if piece.finish_reason is not None:
            deltas += choice.parser.finish()
        if self._prepared.parsing.shows_reasoning:
            return deltas
        return [delta for delta in deltas if not isinstance(delta, Reasoning)]

    @property
    def _is_finished(self) -> bool:
        return all(choice.text.finish_reason is not None for choice in self._choices)

    def _path_header(self) -> tuple[bytes, bytes]:
        paths = ", ".join(choice.request.describe_path() for choice in self._choices)
        return b"x-baton-path", paths.encode("latin-1", "replace")

    # -- whole -------------------------------------------------------------------------------------

    async def _whole(self) -> dict[str, Any]:
        texts = [[choice.echoed] for choice in self._choices]
        pace = Pace()
        while not self._is_finished:
            arrivals = await self._arrivals()
            pace.begin()
            for choice, piece in self._take(arrivals):
                if choice.parser is None:
                    texts[choice.request.choice].append(piece.text)
                else:
                    choice.deltas += self._parsed(choice, piece)
                if len(choice.unsent) >= GATHERED_TOKENS:
                    self._shape.gather(choice)
                await pace.breathe()
        shown = []
        for choice, text in zip(self._choices, texts, strict=True):
            self._shape.gather(choice)
            shown.append(self._shape.whole_choice(choice, "".join(text)))
            await pace.breathe()
        answer = self._shape.whole(self._header, shown, usage_of(self._choices))
        return {**answer, **cache_miss_of(self._choices)}

    async def _send_whole(self, send: Send) -> None:
        body = msgspec.json.encode(await self._whole())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            self._path_header(),
        ]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        for message in body_messages(body):
            await self._send(send, message)

    async def _send_error(self, send: Send, error: RequestError) -> None:
        status, headers, body = error_response(error)
        with suppress(_ReaderGone):
            await self._send(
                send, {"type": "http.response.start", "status": status, "headers": headers}
            )
            await self._send(send, {"type": "http.response.body", "body": body})

    # -- streamed ----------------------------------------------------------------------------------

    async def _send_stream(self, send: Send) -> None:
        arrivals = await self._arrivals(self._frontend.config.header_wait_s)
        headers = [*sse.HEADERS, self._path_header()]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while True:
                await self._send_events(send, arrivals)
                if self._is_finished:
                    break
                arrivals = await self._arrivals(self._frontend.config.keep_alive_s)
                if not arrivals:
                    await self._send_part(send, sse.keep_alive(self._progress()))
            tail = sse.DONE
            if self._options.include_usage:
                tail = sse.event(self._usage_chunk()) + tail
        except RequestError as error:
            tail = sse.error_event(error)
        await self._send(send, {"type": "http.response.body", "body": tail, "more_body": False})

    async def _send_events(self, send: Send, arrivals: Arrivals) -> None:
        """In one piece, unless there are so many that others must run in between."""
        pace, events = Pace(), []
        for event in self._events(arrivals):
            events.append(event)
            if pace.is_over:
                await self._send_part(send, b"".join(events))
                events.clear()
                await pace.breathe()
        await self._send_part(send, b"".join(events))

    def _events(self, arrivals: Arrivals) -> Iterator[bytes]:
        shows_all = self._shape.return_token_ids or self._shape.with_logprobs
        for choice, piece in self._take(arrivals):
            deltas = self._parsed(choice, piece)
            if not deltas and (not choice.is_started or (shows_all and choice.unsent)):
                deltas = [Content("")]
            for delta in deltas:
                yield self._chunk(self._shape.content(choice, delta))
                choice.is_started = True
                choice.unsent.clear()
            if piece.finish_reason is not None:
                yield self._chunk(self._shape.final(choice))

    def _chunk(self, shown: dict[str, Any]) -> bytes:
        chunk = self._shape.chunk(self._header, [shown])
        if self._options.continuous_usage:
            chunk["usage"] = usage_of(self._choices)
        elif self._options.include_usage:
            chunk["usage"] = None
        return sse.event(chunk)

    def _usage_chunk(self) -> dict[str, Any]:
        chunk = self._shape.chunk(self._header, [])
        return {**chunk, "usage": usage_of(self._choices), **cache_miss_of(self._choices)}

    def _progress(self) -> tuple[int, int] | None:
        requests = [choice.request for choice in self._choices]
        done = sum(request.num_prefilled_tokens for request in requests)
        if done == 0 or any(request.num_output_tokens for request in requests):
            return None
        return done, sum(request.num_prompt_tokens for request in requests)

    async def _send_part(self, send: Send, body: bytes) -> None:
        if body:
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with patient(self._frontend.config.send_timeout_s):
                await send(message)
        except TimeoutError as error:
            raise _ReaderGone from error


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
