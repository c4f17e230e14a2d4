"""Lets batch profilers measure what a run found ok, after its cases; nothing of it ends the run.

Imports neither torch nor triton.
"""

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from mambench.harness.failures import trace
from mambench.harness.ledger import Ledger
from mambench.harness.plan import Plan
from mambench.harness.profilers.base import Batch, BatchProfiler, Failed
from mambench.harness.progress import Listener
from mambench.harness.spec import Case, Outcome
from mambench.harness.store import Key
from mambench.harness.workers.pool import Code
from mambench.harness.workers.protocol import Done


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch profilers of one round of a plan."""

    plan: Plan
    ledger: Ledger
    listener: Listener
    profilers: Mapping[str, BatchProfiler]  # those that this device can give, by name
    threads: int
    plugins: tuple[str, ...]
    code: Code  # what a child process imports

    def measure(self, name: str, finished: Set[Key], deadline: float | None) -> None:
        """Measure the cases that are ok with one profiler; fail the others as they failed."""
        left: list[Case] = []
        for planned in self.plan.runnable:
            case = planned.case
            if self.ledger.key(case, name) in finished:
                continue
            self.ledger.begin()
            if failure := self.ledger.earlier_failure(case, (name,)):
                self.ledger.failure(case, name, failure)
            else:
                left.append(case)
        if left and deadline is not None and time.monotonic() > deadline:
            reason = "time budget: nothing was left; resume the run or raise --time-budget"
            done = Done(outcome=Outcome.SKIPPED, reason=reason)
            for case in left:
                self.ledger.failure(case, name, done)
        elif left:
            left_s = math.inf if deadline is None else deadline - time.monotonic()
            self.listener.on_note(f"measuring {name} of {len(left)} cases")
            self._record(name, self._batch(name, left, left_s))
            found = [
                o for o in self.ledger.observed if o.measurement == name and o.method is not None
            ]
            self.listener.on_note(f"measured {name} of {len(found)} of {len(left)} cases")

    def _batch(self, name: str, cases: Sequence[Case], left_s: float) -> Batch:
        order = itertools.count(1)

        def told(case: Case) -> None:
            self.listener.on_phase(case, f"{name} {next(order)} of {len(cases)}")

        return Batch(
            cases=tuple(cases),
            times_s={case.case_id: self.ledger.value(case, "time_s") for case in cases},
            first_calls_s={case.case_id: self.ledger.value(case, "first_call_s") for case in cases},
            left_s=left_s,
            device=self.plan.device,
            settings=self.plan.settings,
            threads=self.threads,
            plugins=self.plugins,
            sys_path=tuple(sys.path),
            code=self.code,
            note=self.listener.on_note,
            on_case=told,
        )

    def _record(self, name: str, batch: Batch) -> None:
        """Record what the profiler yields, and a failure of every case that it does not."""
        profiler = self.profilers[name]
        self.ledger.begin()
        left = {case.case_id: case for case in batch.cases}
        end = Done(outcome=Outcome.ERROR, reason=f"{name} found nothing for this case")
        begun = time.monotonic()
        try:
            for case, found in profiler.measure_batch(batch):
                if left.pop(case.case_id, None) is None:
                    continue  # said twice, or never asked for
                taken_s, begun = time.monotonic() - begun, time.monotonic()
                if isinstance(found, Failed):
                    done = Done(outcome=found.outcome, reason=found.reason, details=found.details)
                    self.ledger.failure(case, name, done, duration_s=taken_s)
                else:
                    self.ledger.measured(case, profiler, found, taken_s)
        except Exception as error:
            reason = f"{type(error).__name__}: {error} (in {name})"
            end = Done(outcome=Outcome.ERROR, reason=reason, details={"traceback": trace(error)})
        for case in left.values():
            self.ledger.failure(case, name, end)
