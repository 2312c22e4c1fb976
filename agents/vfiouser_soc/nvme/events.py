"""Asynchronous events: requests and events that wait, and types masked until their log was read.

Spec: NVMe 1.4, 5.2.
"""

from __future__ import annotations

from collections.abc import Callable

from vfiouser_soc.nvme.spec import (
    ErrorEvent,
    EventType,
    LogPage,
    NoticeEvent,
    NvmeError,
    SmartEvent,
    StatusCode,
)
from vfiouser_soc.nvme.state import AsyncEvent, ControllerState

#: Reading a log page (without Retain Asynchronous Event) allows new events of its type.
_CLEARED_BY = {
    LogPage.ERROR: EventType.ERROR,
    LogPage.SMART: EventType.SMART,
    LogPage.CHANGED_NAMESPACES: EventType.NOTICE,
}


_INFORMATION: dict[int, type[ErrorEvent] | type[SmartEvent] | type[NoticeEvent]] = {
    EventType.ERROR: ErrorEvent,
    EventType.SMART: SmartEvent,
    EventType.NOTICE: NoticeEvent,
}


def check_event(event: AsyncEvent) -> None:
    """Refuse an event that a controller cannot have reported.

    Raises:
        ValueError: it is none.
    """
    if _CLEARED_BY.get(LogPage(event.log_page)) != event.type or event.info not in list(_INFORMATION[event.type]):
        raise ValueError(f"an event of type {event.type}, information {event.info}, log page {event.log_page}")


class AsyncEvents:
    """Matches events with requests.

    Args:
        state: where both wait.
        limit: requests that may wait.
        complete: completes the request with a command id and dword 0.
    """

    def __init__(self, state: ControllerState, limit: int, complete: Callable[[int, int], None]) -> None:
        self._state = state
        self._limit = limit
        self._complete = complete

    def request(self, cid: int) -> None:
        """Take a request.

        Raises:
            NvmeError: too many wait already, or its command id does.
        """
        if cid in self._state.event_requests:
            raise NvmeError(StatusCode.COMMAND_ID_CONFLICT, f"event request {cid} is outstanding")
        if len(self._state.event_requests) >= self._limit:
            raise NvmeError(StatusCode.ASYNC_EVENT_LIMIT, f"more than {self._limit} event requests")
        self._state.event_requests.append(cid)
        self._deliver()

    def report(self, kind: EventType, info: int, log_page: LogPage) -> None:
        """Report an event; one of a type that the host has not looked into since the last one is dropped."""
        event = AsyncEvent(kind, info, log_page)
        if kind not in self._state.masked_events and event not in self._state.events:
            self._state.events.append(event)
            self._deliver()

    def log_was_read(self, log_page: LogPage) -> None:
        """Allow events of the log page's type again."""
        kind = _CLEARED_BY.get(log_page)
        if kind is not None:
            self._state.masked_events.discard(kind)
            self._deliver()

    def abort(self, cid: int) -> bool:
        """Withdraw a request; the caller completes it.

        Returns:
            Whether it waited.
        """
        if cid not in self._state.event_requests:
            return False
        self._state.event_requests.remove(cid)
        return True

    def _deliver(self) -> None:
        state = self._state
        for event in list(state.events):
            if not state.event_requests:
                return
            if event.type not in state.masked_events:
                state.events.remove(event)
                state.masked_events.add(event.type)
                self._complete(state.event_requests.popleft(), event.result)
