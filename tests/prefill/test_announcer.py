"""Announcements of a rank whose device lags behind its host."""

from dataclasses import dataclass

from kvtransfer.events import AnnounceBlocks, AnnouncedAll, Command
from prefill.announcer import Announcer
from protocol.plans import ChunkWork, HandoffRoute, PlacedBlock


@dataclass
class Mark:
    """A point in the stream of a device that gets on by hand."""

    is_reached: bool = False

    def query(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        self.is_reached = True


def test_a_group_is_announced_when_the_device_has_computed_it() -> None:
    submitted: list[Command] = []
    marks: list[Mark] = []

    def mark() -> Mark:
        marks.append(Mark())
        return marks[-1]

    groups = (range(2), range(2, 4), range(4, 6))
    announcer = Announcer(submitted.append, cp_rank=0, block_size=4, groups=groups, mark=mark)
    work = ChunkWork(
        request_id="r",
        attempt=1,
        chunk=1,
        start=0,
        token_ids=(1,) * 4,
        ring=(0,),
        pass_q=False,
        blocks=(PlacedBlock(logical=0, cp_rank=0, block_id=7, generation=1),),
        is_last=True,
        route=HandoffRoute(pool_id="decode0", epoch=1, first_logical=0),
    )
    on_layer_done = announcer.layer_callback(work)
    assert on_layer_done is not None
    for layer in range(4):
        on_layer_done(layer)
    assert len(marks) == 2 and not submitted  # launched, not computed
    marks[0].is_reached = True
    on_layer_done(4)
    assert [c.layer_start for c in submitted if isinstance(c, AnnounceBlocks)] == [0]
    on_layer_done(5)
    announcer.chunk_done(work)  # waits for the device
    *announced, last = submitted
    assert [c.layer_start for c in announced if isinstance(c, AnnounceBlocks)] == [0, 2, 4]
    assert isinstance(last, AnnouncedAll)
    assert all(mark.is_reached for mark in marks)
