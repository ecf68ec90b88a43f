"""The traffic of a soak: everything that a cluster is asked for, all at once, for hours.

streams    completions of random lengths, each token compared; a third of the clients go away
sessions   conversations of several turns at one decode home, each token compared
documents  ingested, asked about twice with the same answer, deleted
batches    a file uploaded, run as a batch, every line answered, its files deleted
rejects    requests that are wrong in one way each, answered with their own error
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from baton_client import AsyncClient, BatonAPIError
from modeling.checkpoint.config import ModelConfig
from tests.arithmetic_reference import expected_tokens
from tests.campaign.tally import Tally

NUM_TURNS = 4
NUM_CONVERSATIONS = 12
DOCUMENT_WORDS = (100, 400)
NUM_LINES = 20
BUDGET_S = 120.0
_WORDS = ("the ", "ring ", "reads ", "a ", "long ", "text ", "block ", "by ", "block ", "and ")
WRONG: tuple[tuple[int, Sequence[int], dict[str, Any]], ...] = (
    (400, [1, 2], {"max_tokens": "many"}),
    (400, [], {}),
    (400, [10**9], {}),
    (400, [1] * 5000, {}),
    (404, [1], {"model": "another"}),
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Prompts of a session's turns, each with the answer before it, and the right answers."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    @staticmethod
    def draw(rng: random.Random, config: ModelConfig) -> "Conversation":
        prompts, answers = [], []
        prompt: tuple[int, ...] = ()
        for _ in range(NUM_TURNS):
            prompt += tuple(rng.randrange(1, 250) for _ in range(rng.randint(20, 150)))
            answer = tuple(expected_tokens(config, prompt, rng.randint(2, 16)))
            prompts.append(prompt)
            answers.append(answer)
            prompt += answer
        return Conversation(tuple(prompts), tuple(answers))


@dataclass
class Traffic:
    """All kinds but the streams, which are a :class:`tests.campaign.workload.Workload`.

    Args:
        url: of the server.
        rng: decides what is asked.
        tally: where wrong tokens and broken promises are told.
        goes_on: asked before each piece of work.
        pause_s: between two of one kind.
    """

    url: str
    rng: random.Random
    tally: Tally
    goes_on: Callable[[], bool]
    pause_s: float = 1.0
    done: Counter[str] = field(default_factory=Counter)

    async def run(self, conversations: Sequence[Conversation]) -> None:
        """Until ``goes_on`` says no."""
        async with (
            AsyncClient(self.url, timeout_s=BUDGET_S) as client,
            asyncio.TaskGroup() as kinds,
        ):
            kinds.create_task(
                self._repeat("sessions", lambda: self._session(client, conversations))
            )
            kinds.create_task(self._repeat("documents", lambda: self._document(client)))
            kinds.create_task(self._repeat("batches", lambda: self._batch(client)))
            kinds.create_task(self._repeat("rejects", lambda: self._reject(client)))

    async def _repeat(self, kind: str, one: Callable[[], Awaitable[None]]) -> None:
        while self.goes_on():
            try:
                async with asyncio.timeout(BUDGET_S):
                    await one()
                self.done[kind] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it must be told and go on
                self.tally.problem(f"{kind}: {type(error).__name__}: {error}"[:300])
            await asyncio.sleep(self.pause_s)

    async def _session(self, client: AsyncClient, conversations: Sequence[Conversation]) -> None:
        conversation = self.rng.choice(conversations)
        session_id = f"s{self.rng.getrandbits(64):x}"
        salt = f"{self.rng.getrandbits(64):x}"
        for prompt, answer in zip(conversation.prompts, conversation.answers, strict=True):
            completion = await client.complete(
                prompt,
                max_tokens=len(answer),
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
                session_id=session_id,
                cache_salt=salt,
            )
            tokens = completion.token_ids
            self.tally.compare(f"session {session_id}", tokens, answer)
            if len(tokens) < len(answer):
                self.tally.problem(f"session {session_id}: {len(tokens)} of {len(answer)} tokens")

    async def _document(self, client: AsyncClient) -> None:
        count = self.rng.randint(*DOCUMENT_WORDS)
        text = "".join(self.rng.choices(_WORDS, k=count)) + f"{self.rng.getrandbits(64)}"
        document = await client.documents.create(text=text)
        await client.documents.wait(document.id, BUDGET_S)
        answers = set()
        for _ in range(2):
            answer = await client.ask(
                "And so?", document_id=document.id, max_tokens=8, temperature=0
            )
            answers.add(await answer.read())
        if len(answers) != 1:
            self.tally.problem(f"{document.id}: two answers to one question: {answers}")
        await client.documents.delete(document.id)

    async def _batch(self, client: AsyncClient) -> None:
        lines = [
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": [self.rng.randrange(1, 250)] * 40, "max_tokens": 4},
            }
            for number in range(NUM_LINES)
        ]
        content = b"\n".join(map(msgspec.json.encode, lines))
        file = await client.files.create(content, filename="lines.jsonl")
        batch = await client.batches.create(file.id, "/v1/completions")
        batch = await client.batches.wait(batch.id, BUDGET_S)
        assert batch.output_file_id is not None
        answered = (await client.files.content(batch.output_file_id)).splitlines()
        if len(answered) != NUM_LINES:
            self.tally.problem(f"{batch.id}: {len(answered)} of {NUM_LINES} lines answered")
        for file_id in (file.id, batch.output_file_id):
            await client.files.delete(file_id)

    async def _reject(self, client: AsyncClient) -> None:
        for status, prompt, parameters in WRONG:
            try:
                await client.complete(prompt, **parameters)
            except BatonAPIError as error:
                found = error.status
            else:
                found = 200
            if found != status:
                self.tally.problem(f"{prompt[:5]} {parameters}: {found}, not {status}")
