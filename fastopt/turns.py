"""One thread at a time."""

from __future__ import annotations

import os
from threading import RLock
from typing import Any

_forks = 0


def _count() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count)


class Turns:
    """A lock for what several threads may do to one optimizer; a thread that has its turn may ask again.

    After a fork it is another lock: of the parent's threads only one lives on, and what another one held would never
    be let go of.
    """

    def __init__(self) -> None:
        self._held = _forks, RLock()
        self.disturbed = False
        """Whether somebody has let go of the plans, and did not wait, while another thread had its turn."""

    def __call__(self) -> Any:
        if self._held[0] != _forks:
            self._held = _forks, RLock()
        return self._held[1]
