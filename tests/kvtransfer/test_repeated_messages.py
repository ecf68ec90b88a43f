"""A message that comes twice, the second time as late as can be, changes nothing."""

from kvtransfer.events import TargetCommitted
from protocol.handoff import Confirm, ReadDone
from tests.kvtransfer.world import Transfer, two_pools


def test_a_question_that_is_asked_again_gets_the_same_answer() -> None:
    """The source has seen all of it read and has closed: its answers were yes, and stay so.

    A second ReadDone that was answered by no would overtake a first yes that is late, and break a
    hand-off that is whole.
    """
    world = two_pools(2, 1, 2)
    transfer = Transfer(world)
    transfer.open()
    world.settle()
    transfer.announce_all()
    world.settle()
    assert transfer.target[0].told(TargetCommitted)
    questions = [sent for sent in world.sent if isinstance(sent[2], ReadDone)]
    world.sent.clear()
    for sender, receiver, message in questions:
        world.message(sender, receiver, message)
    answers = [message for _, _, message in world.sent if isinstance(message, Confirm)]
    assert len(answers) == len(questions)
    assert all(answer.valid for answer in answers)
    world.settle()
    assert transfer.has_arrived
    assert world.num_open == 0


def test_every_message_may_come_twice() -> None:
    world = two_pools(2, 2, 2)
    transfer = Transfer(world)
    transfer.open()
    world.settle()
    transfer.announce_all()
    while pairs := world.waiting():
        pair = pairs[-1]
        message = world.queues[pair][0]
        world.deliver(pair)
        world.message(*pair, message)
        for rank, read_id in world.in_flight():
            world.land(rank, read_id)
    assert len(transfer.target[0].told(TargetCommitted)) == 1
    assert transfer.has_arrived
    assert transfer.committed
    assert world.num_open == 0
