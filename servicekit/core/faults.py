"""Named points at which a fault test may kill the process. In production every point is a no-op."""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from typing import Protocol


class FaultPoint(StrEnum):
    """Where a process can die with the most to lose."""

    AFTER_TURN_BEGUN = "after_turn_begun"
    BEFORE_HOLD = "before_hold"
    AFTER_HOLD = "after_hold"
    MID_STREAM = "mid_stream"
    BEFORE_SETTLE = "before_settle"
    AFTER_SETTLE = "after_settle"
    BEFORE_PUBLISH = "before_publish"
    AFTER_PUBLISH = "after_publish"
    APPLY_LOADED = "apply_loaded"
    APPLY_WRITTEN = "apply_written"
    BEFORE_APPLY_COMMIT = "before_apply_commit"
    AFTER_APPLY_COMMIT = "after_apply_commit"
    JOB_CLAIMED = "job_claimed"
    BEFORE_ASKING = "before_asking"
    ANSWERED = "answered"
    ANSWER_KEPT = "answer_kept"
    RECALLED = "recalled"
    FACT_DECIDED = "fact_decided"
    JOB_FINISHED = "job_finished"


class Faults(Protocol):
    """Told each time a point is reached."""

    def reach(self, point: FaultPoint) -> None: ...


class NoFaults:
    """Nothing ever goes wrong here."""

    def reach(self, point: FaultPoint) -> None:
        pass


class KillAt:
    """kill -9 of this process when `point` is reached for the `count`th time."""

    def __init__(self, point: FaultPoint, *, count: int = 1) -> None:
        self._point = point
        self._left = count

    def reach(self, point: FaultPoint) -> None:
        if point is not self._point:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def faults_from(setting: str) -> Faults:
    """`""` = none; `point` or `point:count` = KillAt. Raises ValueError for an unknown point."""
    if not setting:
        return NoFaults()
    name, _, count = setting.partition(":")
    return KillAt(FaultPoint(name), count=int(count or 1))
