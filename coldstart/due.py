"""When a further generation is due by the handler's policy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coldstart.definition import Policy
    from coldstart.generation_plan import Plan


class Due:
    """When a plan is due again by the handler's policy."""

    def __init__(self, plan: Plan, policy: Policy, served: int) -> None:
        self.plan = plan._replace(due_at_once=False, adds_kernels=False, capture=plan.capture._replace(mends=False))
        self._policy = policy
        self._created_seconds = plan.created_seconds or time.time()
        self._served = served
        self._since_seconds = time.monotonic()

    def is_met(self, served: int) -> bool:
        """Whether one of the policy's conditions holds."""
        policy = self._policy
        return bool(
            (policy.after_events and served - self._served >= policy.after_events)
            or (policy.interval_seconds and time.monotonic() - self._since_seconds >= policy.interval_seconds)
            or (policy.maximum_age_seconds and time.time() - self._created_seconds >= policy.maximum_age_seconds)
        )

    def restart(self, served: int) -> None:
        """Count anew, after an attempt whatever its outcome: a failing one must not be repeated every half second."""
        self._served, self._since_seconds, self._created_seconds = served, time.monotonic(), time.time()
