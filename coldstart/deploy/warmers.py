"""Warming up what is deployed: its minimum of workers is raised, real events are sent, and the minimum is put back.

A warmer stands for one deployed thing. ``prewarm`` drives several, and puts every minimum back whatever happens, unless it
is asked to keep them. Nothing here knows what the events do: a worker that starts warms itself up and makes or restores
its snapshot. RunPod's warmer is here, Modal's in ``coldstart.deploy.modal_warmers``.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from coldstart.config import read_variable
from coldstart.deploy.prewarm import Report, Task, Ticket, run_all
from coldstart.deploy.rest import Recorder, RestClient, listed, runpod_client, segment
from coldstart.errors import ConflictError, DeployError, PlatformBusyError, ResourceMissingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.deploy.rest import Client

RUNPOD_ENDPOINTS_URL = "https://api.runpod.ai/v2"
POLL_SECONDS = 1.0
_ATTEMPTS = 4
_TOO_MANY_REQUESTS = 429


class Warmed(NamedTuple):
    """What the platform told of one warm-up. Times are seconds, None where it does not say."""

    worker: str
    delay_seconds: float | None
    execution_seconds: float | None


class Warmer(Protocol):
    """One deployed thing that can be warmed up."""

    name: str
    count: int

    def raise_minimum(self) -> None:
        """Let the platform have ``count`` workers at least. Raises DeployError."""

    def warm(self, number: int, ticket: Ticket) -> Warmed:
        """Send warm-up ``number`` and wait for its answer. Raises DeployError, and what the ticket raises."""

    def ready_count(self) -> int:
        """How many workers are ready. Raises DeployError."""

    def put_back(self) -> None:
        """Make the minimum what it was, if it is still what was made of it. Raises DeployError."""

    def planned(self) -> Iterator[str]:
        """What would be sent, for a dry run, with secrets masked."""


class Result(NamedTuple):
    """What became of a pre-warming: the warm-ups' report, and how many workers of each name were ready at last."""

    report: Report
    ready: dict[str, int]
    wanted: dict[str, int]

    @property
    def good(self) -> bool:
        """Whether every warm-up is done and as many workers are ready as were asked for."""
        return self.report.good and all(self.ready.get(name, 0) >= count for name, count in self.wanted.items())


def prewarm(
    warmers: Sequence[tuple[Warmer, int]],
    *,
    max_concurrent: int,
    timeout_seconds: float,
    keep: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> Result:
    """Warm up all ``warmers``, each with its priority, and wait until their workers are ready.

    ``timeout_seconds`` is each warm-up's limit, and then that of the wait. Ctrl-C ends it early. Whatever happens, the
    minimums are put back, unless ``keep``. Raises DeployError where one cannot be raised, or put back.
    """
    with ExitStack() as stack:
        for warmer, _ in warmers:
            if not keep:
                stack.callback(warmer.put_back)
            warmer.raise_minimum()
        report = run_all(_tasks(warmers), max_concurrent=max_concurrent, timeout_seconds=timeout_seconds)
        deadline_seconds = time.monotonic() + (0.0 if report.interrupted else timeout_seconds)
        ready = {warmer.name: _await_ready(warmer, deadline_seconds, poll_seconds) for warmer, _ in warmers}
    return Result(report, ready, {warmer.name: warmer.count for warmer, _ in warmers})


def _tasks(warmers: Sequence[tuple[Warmer, int]]) -> list[Task]:
    return [
        Task(f"{warmer.name} {number + 1}", _warm(warmer, number), priority)
        for warmer, priority in warmers
        for number in range(warmer.count)
    ]


def _warm(warmer: Warmer, number: int) -> Callable[[Ticket], Warmed]:
    return lambda ticket: warmer.warm(number, ticket)


def _await_ready(warmer: Warmer, deadline_seconds: float, poll_seconds: float) -> int:
    """Wait until enough workers are ready, and return how many are; a platform that cannot say counts as none yet."""
    ready = 0
    while True:
        with suppress(PlatformBusyError):
            ready = warmer.ready_count()
        if ready >= warmer.count or time.monotonic() >= deadline_seconds:
            return ready
        time.sleep(poll_seconds)


# --- RunPod ----------------------------------------------------------------------------------------------------------


class RunPodWarmer:
    """A queue endpoint of RunPod: REST v2 (``manage``) has its minimum, the client plane (``jobs``) takes its events."""

    def __init__(
        self,
        name: str,
        count: int,
        inputs: Sequence[Any],
        *,
        manage: Client,
        jobs: Client,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.name = name
        self.count = count
        self._inputs = inputs
        self._manage = manage
        self._jobs = jobs
        self._poll_seconds = poll_seconds
        endpoint = _endpoint(manage, name)
        self._id = str(endpoint["id"])
        self._path = f"/v2/serverless/{segment(self._id)}"
        self._workers: dict[str, Any] = dict(endpoint.get("workers") or {})
        self._minimum = int(self._workers.get("min") or 0)
        self._touched = False
        self._check(endpoint)

    def _check(self, endpoint: dict[str, Any]) -> None:
        most = self._workers.get("max")
        if endpoint.get("type") == "LOAD_BALANCER":
            raise UsageError(f"endpoint {self.name!r} balances load and has no queue to send warm-ups to")
        if most is not None and self.count > int(most):
            raise UsageError(
                f"endpoint {self.name!r} may have {most} workers at most, fewer than --count {self.count}: ask for fewer,"
                " or deploy it with a higher --max-workers"
            )

    def raise_minimum(self) -> None:
        """Let the endpoint have ``count`` workers at least, if it has fewer."""
        if self._minimum < self.count:
            self._touched = True  # before the request: it may take effect although its answer is lost
            self._manage.request("PATCH", self._path, {"workers": {**self._workers, "min": self.count}})

    def put_back(self) -> None:
        """Make the minimum what it was, unless somebody else has changed it meanwhile."""
        if not self._touched:
            return
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._put_back()
            except PlatformBusyError as error:
                if attempt == _ATTEMPTS:
                    raise self._left(error) from error
                time.sleep(self._poll_seconds)
            except ResourceMissingError:  # deleted meanwhile: it costs nothing
                return
            except DeployError as error:
                raise self._left(error) from error
            else:
                return

    def _put_back(self) -> None:
        now = self._manage.request("GET", self._path)
        workers = dict((now or {}).get("workers") or {})
        if workers.get("min") == self.count:
            self._manage.request("PATCH", self._path, {"workers": {**workers, "min": self._minimum}})
        self._touched = False

    def _left(self, error: DeployError) -> DeployError:
        return DeployError(
            f"the minimum of endpoint {self.name!r} ({self._id}) may still be {self.count}, which costs money: set it back"
            f" to {self._minimum} ({error})",
            status=error.status,
        )

    def warm(self, number: int, ticket: Ticket) -> Warmed:
        """Send one event, and follow it until it ends. One that is given up is cancelled."""
        job = str(self._send(number, ticket)["id"])
        try:
            while True:
                status = self._jobs.request("GET", f"/{segment(self._id)}/status/{segment(job)}") or {}
                if status.get("status") not in ("IN_QUEUE", "IN_PROGRESS"):
                    break
                ticket.wait(self._poll_seconds)
        except BaseException:
            with suppress(DeployError):
                self._jobs.request("POST", f"/{segment(self._id)}/cancel/{segment(job)}")
            raise
        return _warmed(job, status)

    def _send(self, number: int, ticket: Ticket) -> dict[str, Any]:
        while True:
            try:
                sent = self._jobs.request("POST", f"/{segment(self._id)}/run", self._event(number))
            except PlatformBusyError as error:
                if error.status != _TOO_MANY_REQUESTS:  # any other may have been taken
                    raise
                ticket.wait(self._poll_seconds)
                continue
            if not isinstance(sent, dict) or not sent.get("id"):
                raise DeployError(f"endpoint {self.name!r} took a warm-up and gave no id: {str(sent)[:200]}")
            return sent

    def _event(self, number: int) -> dict[str, Any]:
        return {"input": self._inputs[number % len(self._inputs)]}

    def ready_count(self) -> int:
        """Workers that are idle, or at work for others."""
        health = self._jobs.request("GET", f"/{segment(self._id)}/health") or {}
        workers = health.get("workers") or {}
        at_hand = int(workers.get("idle") or 0) + int(workers.get("running") or 0)
        return max(at_hand, int(workers.get("ready") or 0))

    def planned(self) -> Iterator[str]:
        """The requests, as they would be sent."""
        manage, jobs = self._manage.base_url + self._path, f"{self._jobs.base_url}/{self._id}"
        raises = self._minimum < self.count
        if raises:
            yield f"PATCH {manage} {json.dumps({'workers': {**self._workers, 'min': self.count}})}"
        for number in range(self.count):
            yield f"POST {jobs}/run {json.dumps(self._event(number))}"
        yield f"GET {jobs}/status/<id of each>"
        yield f"GET {jobs}/health"
        if raises:
            yield f"PATCH {manage} {json.dumps({'workers': self._workers})}"


def _endpoint(manage: Client, name: str) -> dict[str, Any]:
    """The endpoint of that name, or id. Of a dry run that can ask nobody: one that stands for it."""
    if isinstance(manage, Recorder) and not manage.knows:
        return {"id": f"<id of {name}>"}
    endpoints = listed(manage, "/v2/serverless", "endpoints")
    found = [each for each in endpoints if name in (each.get("name"), each.get("id"))]
    if len(found) > 1:
        ids = ", ".join(str(each["id"]) for each in found)
        raise ConflictError(f"there are {len(found)} endpoints named {name!r}: give one's id ({ids})")
    if not found:
        there = ", ".join(sorted(str(each.get("name")) for each in endpoints)) or "none at all"
        raise ResourceMissingError(f"no endpoint is named {name!r} (there: {there}): deploy it, or check the account")
    return found[0]


def _warmed(job: str, status: dict[str, Any]) -> Warmed:
    """What an ended job tells. Raises DeployError for one that was not completed."""
    if status.get("status") != "COMPLETED":
        reason = str(status.get("error") or "it gave no reason")
        raise DeployError(f"job {job} {status.get('status')}: {reason[:300]}")
    return Warmed(
        str(status.get("workerId") or ""), _seconds(status.get("delayTime")), _seconds(status.get("executionTime"))
    )


def _seconds(milliseconds: Any) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) else None


def runpod_warmers(names: Sequence[str], count: int, inputs: Sequence[Any], *, dry_run: bool) -> list[RunPodWarmer]:
    """Warmers of RunPod endpoints. RUNPOD_API_KEY is the key; RUNPOD_ENDPOINT_BASE_URL is where events go."""
    manage = runpod_client(dry_run=dry_run)
    base_url = read_variable("RUNPOD_ENDPOINT_BASE_URL") or RUNPOD_ENDPOINTS_URL
    if dry_run:
        jobs: Client = Recorder(base_url)
    else:
        jobs = RestClient(base_url, (read_variable("RUNPOD_API_KEY") or "").strip())
    return [RunPodWarmer(name, count, inputs, manage=manage, jobs=jobs) for name in names]
