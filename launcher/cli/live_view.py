"""A picture that is drawn again each second, until q or Ctrl-C."""

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from baton_client import BatonAPIError, BatonConnectionError

INTERVAL_S = 1.0
MAX_KEYS = 1024  # that are read at once
QUIT = frozenset(b"qQ")


class Keys:
    """The keyboard, one key at a time and without an echo, where there is one."""

    def __init__(self) -> None:
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        if sys.stdin.isatty():
            before = termios.tcgetattr(sys.stdin)
            self._restore = lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
            tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # keeps what was pressed before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._restore is not None:
            self._restore()

    def wait_for_quit(self, seconds: float) -> bool:
        """Whether q is pressed within a time."""
        if self._restore is None:
            threading.Event().wait(seconds)
            return False
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(readable) and not QUIT.isdisjoint(os.read(sys.stdin.fileno(), MAX_KEYS))


def can_redraw(console: Console) -> bool:
    """Whether lines on this console can be overwritten."""
    return console.is_terminal and not console.is_dumb_terminal


def watch(
    console: Console, draw: Callable[[], RenderableType], interval_s: float = INTERVAL_S
) -> None:
    """Draw until q or Ctrl-C. Without a terminal, one picture below the other.

    Raises:
        ClientError: the first picture cannot be drawn. Later failures are shown, and it goes on.
    """
    frame = draw()
    try:
        if not can_redraw(console):
            while True:
                console.print(frame)
                threading.Event().wait(interval_s)
                frame = _draw_again(draw, frame)
        with Keys() as keys, Live(frame, console=console, screen=True, auto_refresh=False) as live:
            live.refresh()
            while not keys.wait_for_quit(interval_s):
                frame = _draw_again(draw, frame)
                live.update(frame, refresh=True)
    except KeyboardInterrupt:
        return


def _draw_again(draw: Callable[[], RenderableType], last: RenderableType) -> RenderableType:
    try:
        return draw()
    except (BatonAPIError, BatonConnectionError) as error:
        old = last.renderables[0] if isinstance(last, Group) else last
        return Group(old, Text(f"as it was: {error}", style="red"))
