"""The contract of an agent as a suite that anybody can run against their own; it needs no test framework.

    results = await check_agent(lambda: MyAgent(...), function_id="nvme0")
    assert all(result.outcome is not CheckOutcome.FAILED for result in results)

The function that it runs on is stopped, overwritten with its own state and reset, again and again: take one that nobody
uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

import trio

from .api import Agent, AgentState, Outcome, Session
from .contract import dirty, lifecycle, state
from .contract.bench import Bench, Check, CheckFailed
from .errors import AgentError, NotFound

#: Every check, in the order in which they run.
CHECKS: Sequence[Check] = (*lifecycle.CHECKS, *state.CHECKS, *dirty.CHECKS)
#: Seconds that one check may take, unless said otherwise.
DEADLINE = 30.0


class CheckOutcome(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    #: It needs something that the capabilities do not claim.
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check and how it ended.

    Args:
        name: of the check.
        says: the rule that it proves.
        outcome: how it ended.
        detail: what was wrong, or why it does not apply.
        seconds: how long it took.
    """

    name: str
    says: str
    outcome: CheckOutcome
    detail: str = ""
    seconds: float = 0.0


class NotUsable(Exception):
    """The suite cannot run: there is no agent, no function, or the function is in use; the message says which."""


async def check_agent(
    factory: Callable[[], Agent],
    *,
    function_id: str | None = None,
    names: Sequence[str] | None = None,
    deadline_s: float = DEADLINE,
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the contract against an agent.

    Args:
        factory: makes an agent for the same service, not yet entered; called for every check.
        function_id: the function to work on; None = the only one that the agent has.
        names: checks to run; None = all.
        deadline_s: seconds that one check may take.
        on_result: told each result as it comes.

    Returns:
        A result for each check, in order.

    Raises:
        NotUsable: there is nothing to check, or the function is in use.
    """
    chosen = [check for check in CHECKS if names is None or check.name in names]
    function_id = await _usable_function(factory, function_id, deadline_s)
    results = []
    for check in chosen:
        begin = trio.current_time()
        outcome, detail = await _run(check, factory, function_id, deadline_s)
        result = CheckResult(check.name, check.says, outcome, detail, trio.current_time() - begin)
        results.append(result)
        on_result(result)
    return results


async def _usable_function(factory: Callable[[], Agent], function_id: str | None, deadline_s: float) -> str:
    try:
        with trio.fail_after(deadline_s):
            async with factory() as agent:
                await agent.connect()
                if function_id is None:
                    function_id = await _only_function(agent)
                session = await agent.open(function_id)
                status = await session.status()
                silent = not session.caps.status_query
    except trio.TooSlowError:
        raise NotUsable(f"the agent did not answer within {deadline_s:g} s") from None
    except AgentError as error:
        raise NotUsable(f"{type(error).__name__}: {error}") from error
    if not silent and (status.state is not AgentState.RUNNING or status.role is not None):
        role = f", {status.role.value} of migration {status.migration_id!r}" if status.role else ""
        raise NotUsable(f"function {function_id} is {status.state.value}{role}; it must be running and in no migration")
    return function_id


async def _only_function(agent: Agent) -> str:
    found = [function.function_id for function in await agent.functions()]
    if len(found) != 1:
        raise NotFound(f"name the function to check (there are: {', '.join(found) or 'none'})")
    return found[0]


async def _run(
    check: Check, factory: Callable[[], Agent], function_id: str, deadline_s: float
) -> tuple[CheckOutcome, str]:
    verdict = _Verdict(deadline_s)
    missing = ""
    with verdict, trio.fail_after(deadline_s):
        missing = await _run_inside(check, factory, function_id, verdict)
    if verdict.detail:
        return CheckOutcome.FAILED, verdict.detail
    return (CheckOutcome.NOT_APPLICABLE, f"needs {missing}") if missing else (CheckOutcome.PASSED, "")


async def _run_inside(check: Check, factory: Callable[[], Agent], function_id: str, verdict: _Verdict) -> str:
    missing = ""
    # The inner verdict sees errors as they are, before the nursery of some agent puts them into a group.
    async with factory() as agent:
        with verdict:
            await agent.connect()
            session = await agent.open(function_id)
            missing = ", ".join(name for name in check.needs if not getattr(session.caps, name))
            if not missing:
                await _known_state(session)
                with verdict:
                    await check.body(Bench(factory, agent, session, session.caps))
                await _known_state(session)
    return missing


class _Verdict:
    """Takes whatever a check raises: what is wrong with one must not keep the others from running."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self.detail = ""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.detail = self.detail or self._text(error)
        return True

    def _text(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, trio.TooSlowError):
            return f"not done within {self._deadline_s:g} s"
        return str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"


async def _known_state(session: Session) -> None:
    if session.caps.reset:
        await session.reset()
    else:
        await session.end(Outcome.CANCELLED)
        await session.dirty_stop()
        await session.resume()
    status = await session.status()
    if status.state is not AgentState.RUNNING or status.role is not None:
        raise CheckFailed(f"cannot return the function to running and no migration: status shows {status}")


__all__ = ["CHECKS", "DEADLINE", "CheckOutcome", "CheckResult", "NotUsable", "check_agent"]
