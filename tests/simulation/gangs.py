"""What all simulated gangs are: steps of any length, and blocks recounted at every turn."""

from typing import Generic

from bench.simulate.gangs import Gang
from engine.leader_node import P

FINGERPRINT = "simulated"
MAX_MODEL_LEN = 200
STEP_S = 0.01
Key = tuple[str, int]


class CheckedGang(Gang[P], Generic[P]):
    """A gang whose steps take some time, and whose blocks are recounted at every turn."""

    def _step_s(self, plan: P) -> float:
        del plan
        return self.world.delay(STEP_S)

    def _turn(self) -> None:
        super()._turn()
        self.node.check()
