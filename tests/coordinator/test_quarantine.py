"""Who is refused: only who was there each time, and nobody for having been in the same place."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.requests.quarantine import MAX_REMEMBERED, Quarantine, fingerprint
from kvcache.prefix import hash_blocks
from protocol.request import SamplingParams

A, B, C = b"a", b"b", b"c"
SAMPLING = SamplingParams(max_tokens=8, seed=3, temperature=0.5)


def test_two_deaths_and_it_is_clear_who_it_was() -> None:
    quarantine = Quarantine(2, 100.0)
    assert quarantine.on_death([A, B], 0.0) is None
    assert not quarantine.is_refused(A, 0.0)
    assert quarantine.on_death([A, C], 1.0) == A
    assert quarantine.is_refused(A, 1.0)
    assert not quarantine.is_refused(B, 1.0) and not quarantine.is_refused(C, 1.0)
    assert not quarantine.is_refused(A, 101.0), "it may be tried again"


def test_together_twice_is_not_clear_and_alone_is() -> None:
    quarantine = Quarantine(2, 100.0)
    quarantine.on_death([A, B], 0.0)
    assert quarantine.on_death([A, B], 1.0) is None
    assert quarantine.is_doubtful(A, 1.0) and quarantine.is_doubtful(B, 1.0)
    quarantine.clear(A)
    assert quarantine.on_death([A, B, C], 2.0) == B
    assert not quarantine.is_refused(A, 2.0)


def test_the_same_twice_on_board_counts_once() -> None:
    quarantine = Quarantine(2, 100.0)
    assert quarantine.on_death([A, A], 0.0) is None
    assert quarantine.num_deaths(A, 0.0) == 1


def test_deaths_are_forgotten_in_time() -> None:
    quarantine = Quarantine(2, 100.0)
    quarantine.on_death([A], 0.0)
    assert quarantine.on_death([A], 101.0) is None


def test_nobody_fills_the_memory() -> None:
    quarantine = Quarantine(1, 100.0)
    for number in range(MAX_REMEMBERED + 10):
        quarantine.on_death([str(number).encode()], 0.0)
    assert not quarantine.is_refused(b"0", 0.0)
    assert quarantine.is_refused(str(MAX_REMEMBERED).encode(), 0.0)


@given(
    num_bystanders=st.integers(0, 6),
    rng=st.randoms(use_true_random=False),
    num_deaths=st.integers(2, 3),
)
def test_a_culprit_among_bystanders_who_come_and_go(
    num_bystanders: int, rng: object, num_deaths: int
) -> None:
    """Bystanders are cleared as soon as they get further, or are tried one at a time."""
    quarantine = Quarantine(num_deaths, 100.0)
    bystanders = [bytes([i]) for i in range(num_bystanders)]
    for death in range(2 * num_deaths):
        some = [b for b in bystanders if rng.random() < 0.7]  # type: ignore[attr-defined]
        doubtful = [b for b in (*some, A) if quarantine.is_doubtful(b, 0.0)]
        if len(doubtful) > 1:  # then they are tried alone, and who does nothing is cleared
            for bystander in some:
                quarantine.clear(bystander)
        guilty = quarantine.on_death([*some, A], 0.0)
        if guilty is not None:
            assert guilty == A or num_deaths == death + 1
            return
    raise AssertionError("it was never found")


@pytest.mark.parametrize("num_tokens", [1, 4, 9, 16])
def test_what_a_fingerprint_is_of(num_tokens: int) -> None:
    prompt = tuple(range(num_tokens))

    def of(prompt: tuple[int, ...], sampling: SamplingParams = SAMPLING) -> bytes:
        return fingerprint(prompt, hash_blocks(prompt, 4, "salt"), 4, sampling)

    assert of(prompt) == of(prompt)
    assert of(prompt) == of(prompt, msgspec.structs.replace(SAMPLING, seed=9)), "drawn, perhaps"
    assert of(prompt) != of(prompt, msgspec.structs.replace(SAMPLING, temperature=0.0))
    assert of(prompt) != of((*prompt, 0))
    assert of(prompt) != of((*prompt[:-1], 99))
    assert of(prompt) != of((99, *prompt[1:]))
