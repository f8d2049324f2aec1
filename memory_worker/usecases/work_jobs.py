"""From a turn to memories: extraction, checks, recall, verdicts, and one short transaction a fact.

Every model call has the identity of its question and its answer is journalled, so that a job that died half-way goes on
where it was, is answered alike and charged once. No model is asked inside a transaction: what was decided upon must
still be so when it is written, or it is decided again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from memory_worker.domain.decision import POLICY_VERSIONS, Action, Candidate, Plan, Verdict, decide
from memory_worker.domain.item import Fact
from memory_worker.domain.job import CREDIT_WAIT, MOST_TRIES, Job, JobState, call_key, wait_after
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.extraction import PROMPTS, USER_ROLE
from memory_worker.usecases.judging import Ask, Question, facts_of, verdicts_of
from memory_worker.usecases.memory_ports import (
    DecisionStore,
    Embedder,
    ItemStore,
    Looking,
    MemoriesChanged,
    Outcome,
    Vector,
    Vectors,
)
from memory_worker.usecases.ports import (
    AnswerJournal,
    JobQueue,
    LeaseLost,
    ModelAnswer,
    ModelCallFailed,
    ModelQuestion,
    Models,
    Policy,
)
from memory_worker.usecases.vector_index import IndexSearch
from servicekit.core.errors import DomainError
from servicekit.core.faults import FaultPoint, Faults
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

LEASE = timedelta(seconds=30)
BEAT_SECONDS = 8.0
POLL_SECONDS = 0.2
MOST_REDECISIONS = 10
MOST_CUT_ANSWERS = 4


class JobWorker:
    """Works on jobs, `most_running` at once."""

    def __init__(
        self, jobs: JobQueue, answers: AnswerJournal, items: ItemStore, decisions: DecisionStore, models: Models,
        embedders: Embedders, search: IndexSearch, *, opened: Callable[[Job], Job], policy: Policy, owner: str,
        most_running: int, faults: Faults, ended: Callable[[str], None] = lambda _state: None,
    ) -> None:
        self._jobs = jobs
        self._answers = answers
        self._items = items
        self._decisions = decisions
        self._models = models
        self._embedders = embedders
        self._search = search
        self._opened = opened
        self._policy = policy
        self._owner = owner
        self._most_running = most_running
        self._faults = faults
        self._ended = ended
        self._claims = 0
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is something new."""
        self._wake.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._wake.clear()
                room = self._most_running - len(running)
                claimed = await self._claim(room) if room else []
                for job, owner in claimed:
                    running.add(asyncio.create_task(self._hold_and_work(job, owner)))
                if running:
                    _, running = await asyncio.wait(
                        running, timeout=0 if claimed and room > len(claimed) else POLL_SECONDS,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                if not claimed and not running:
                    try:
                        async with asyncio.timeout(POLL_SECONDS):
                            await self._wake.wait()
                    except TimeoutError:
                        continue
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _claim(self, limit: int) -> list[tuple[Job, str]]:
        """Each claim has an owner of its own, so that a job that was lost and claimed again is not finished twice."""
        self._claims += 1
        owner = f"{self._owner}:{self._claims}"
        try:
            return [(job, owner) for job in await self._jobs.claim(owner, limit=limit, lease=LEASE)]
        except DomainError as error:
            log.warning("claim_failed", reason=str(error))
            await asyncio.sleep(1.0)
            return []

    async def _hold_and_work(self, job: Job, owner: str) -> None:
        beating = asyncio.create_task(self._beat(job, owner))
        try:
            await self.work(job, owner)
        except LeaseLost:
            log.warning("lease_lost", job_id=str(job.job_id))
        except DomainError as error:
            log.warning("job_put_off", job_id=str(job.job_id), reason=error.reason)  # due again after its lease
        except Exception as error:  # noqa: BLE001 - logged; the job is due again after its lease
            log.error("job_failed", error=error, job_id=str(job.job_id))
        finally:
            beating.cancel()

    async def _beat(self, job: Job, owner: str) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self._jobs.beat(owner, [job.job_id], lease=LEASE)
            except DomainError as error:
                log.warning("heartbeat_failed", reason=str(error))

    async def work(self, job: Job, owner: str) -> None:
        """Works one job to its end, or to its next try. Raises LeaseLost, DependencyUnavailable."""
        self._faults.reach(FaultPoint.JOB_CLAIMED)
        try:
            reason = await self._decide_all(self._readable(job), owner)
        except ModelCallFailed as failure:
            await self._put_off(job, owner, failure)
            return
        try:
            await self._end(job, owner, JobState.DONE, reason)
        except ModelCallFailed as failure:
            await self._put_off(job, owner, failure)
            return
        self._faults.reach(FaultPoint.JOB_FINISHED)
        self._ended("DONE")

    def _readable(self, job: Job) -> Job:
        try:
            return self._opened(job)
        except DomainError as error:
            raise ModelCallFailed("TRANSIENT", error.reason) from error
        except ValueError as error:
            raise ModelCallFailed("PERMANENT", "TURN_UNREADABLE") from error

    async def _put_off(self, job: Job, owner: str, failure: ModelCallFailed) -> None:
        state, wait = JobState.QUEUED, wait_after(job.tries, draw=self._random.random())
        if failure.kind == "NO_CREDIT":
            state, wait = JobState.WAITING_FOR_CREDIT, CREDIT_WAIT
        dead = failure.kind == "PERMANENT" or (failure.kind != "NO_CREDIT" and job.tries >= MOST_TRIES)
        if dead:
            try:
                await self._end(job, owner, JobState.DEAD, failure.reason)
                log.error("job_dead", job_id=str(job.job_id), reason=failure.reason)
            except ModelCallFailed:
                dead = False  # what it cost is not known yet
        if not dead:
            await self._jobs.finish(
                job, owner, state, reason=failure.reason, next_try_in=wait, new_generation=failure.kind == "GONE"
            )
        self._ended("DEAD" if dead else state.name)

    async def _end(self, job: Job, owner: str, state: JobState, reason: str) -> None:
        """Not before it is known what every question cost, also those whose answer was not heard. Raises LeaseLost,
        ModelCallFailed while that can not be known."""
        while not await self._jobs.finish(job, owner, state, reason=reason):
            for key in await self._answers.unanswered(job):
                cost = await self._models.cost(job.user_id, key)
                if cost is None:
                    await self._answers.forget(job, key)
                else:
                    await self._answers.keep(job, key, cost)

    async def _decide_all(self, job: Job, owner: str) -> str:
        """Why nothing was remembered, or ""."""
        settings = await self._items.settings(job.user_id)
        if not settings.memory_enabled:
            return "MEMORY_OFF"
        if not any(each.role == USER_ROLE and each.text.strip() for each in job.turn.said):
            return "NOTHING_SAID"
        ask = self._asker(job, _Budget(self._policy.most_calls))
        shown = await self._items.contents_of(job.user_id, job.turn.memory_ids)
        facts = await facts_of(ask, job, settings=settings, policy=self._policy, shown=shown)
        # A try that was overtaken may have decided something since this one was claimed.
        may_have = job.has_decisions or job.tries > 1
        decisions = await self._decisions.decisions_of(job.user_id, job.job_id) if may_have else []
        decided, number = {each.fact.digest for each in decisions}, len(decisions) - 1
        for fact, objection in facts:
            if fact.digest in decided:
                continue
            decided.add(fact.digest)
            number += 1
            if objection:
                await self._drop(job, owner, number, fact, objection)
            else:
                await self._decide(job, owner, ask, number, fact)
            self._faults.reach(FaultPoint.FACT_DECIDED)
        return "" if facts else "NOTHING_TO_REMEMBER"

    async def _drop(self, job: Job, owner: str, number: int, fact: Fact, objection: str) -> None:
        await self._decisions.apply(Outcome(
            job, number, fact, Plan(Action.DROP), objection, (), 0, "", self._policy_version, PROMPTS
        ), owner)

    async def _decide(self, job: Job, owner: str, ask: Ask, number: int, fact: Fact) -> None:
        """Until the memories stand still between recall and writing."""
        key = partial(_embed_key, job, fact.digest)
        for _ in range(MOST_REDECISIONS):
            serving = self._embedders.serving
            floor = serving.floors.recall if self._policy.floor is None else self._policy.floor
            vector = await self._vector(job, serving, fact.content, key)
            most = self._policy.most_candidates
            near = await self._search.near(serving.name, job.user_id, vector, types=[fact.type], most=most)
            recall = await self._decisions.recall(
                job.user_id, fact, Looking(vector, serving.name, near), most=most, floor=floor
            )
            self._faults.reach(FaultPoint.RECALLED)
            verdicts: list[Verdict] = []
            if recall.exact is not None:
                plan, reason = Plan(Action.KEEP, recall.exact.item_id), "EXACT"
            else:
                verdicts = await verdicts_of(ask, fact, [
                    Candidate(item.item_id, item.version, item.content, score) for item, score in recall.candidates
                ], self._policy)
                plan, reason = decide(self._policy.decision, verdicts), "COMPARED"
                if plan.action is Action.RETRY:
                    raise ModelCallFailed("PERMANENT", "VERDICT_UNKNOWN")
            vectors: Vectors = {}
            merged: Vectors = {}
            if plan.action is Action.ADD:
                vectors = await self._embedders.vectors(job.user_id, fact.content, key, known={serving.name: vector})
            elif plan.action is Action.MERGE:
                named = partial(_embed_key, job, plan.merged)
                now_serving = self._embedders.serving
                known = {now_serving.name: await self._vector(job, now_serving, plan.merged, named)}
                merged = await self._embedders.vectors(job.user_id, plan.merged, named, known=known)
            try:
                await self._decisions.apply(Outcome(
                    job, number, fact, plan, reason, tuple(verdicts), recall.revision,
                    "scan" if recall.scanned else "index", self._policy_version, PROMPTS, vectors=vectors,
                    merged_vectors=merged,
                ), owner)
            except MemoriesChanged:
                continue
            return
        raise ModelCallFailed("TRANSIENT", "MEMORIES_KEEP_CHANGING")

    async def _vector(self, job: Job, embedder: Embedder, text: str, key: Callable[[str], str]) -> Vector:
        """What it costs is the job's."""
        name = key(embedder.name)
        if embedder.charges:
            await self._answers.begin(job, name, "embed")
        made = await embedder.embed(job.user_id, [text], request_id=name)
        if embedder.charges:
            await self._answers.keep(
                job, name, ModelAnswer("", made.tokens, made.credit_micros, made.call_id)
            )
        return made.vectors[0]

    def _asker(self, job: Job, calls: _Budget) -> Ask:
        """From the journal, or from the model and then into the journal. An answer that was cut, because the worker
        died while it was given, was paid for and is of no use: it is journalled, and asked for under another name."""
        async def ask(question: Question) -> str:
            for again in range(MOST_CUT_ANSWERS):
                key = call_key(job, question.stage, *question.parts, again)
                answer = await self._answers.begin(job, key, question.stage)
                if answer is None:
                    calls.take()
                    self._faults.reach(FaultPoint.BEFORE_ASKING)
                    answer = await self._models.ask(ModelQuestion(
                        key, job.user_id, question.scene, question.alias, question.instructions, question.data,
                        f"memory_{question.stage}", question.schema, job.turn.traceparent,
                    ))
                    self._faults.reach(FaultPoint.ANSWERED)
                    await self._answers.keep(job, key, answer)
                    self._faults.reach(FaultPoint.ANSWER_KEPT)
                if answer.text:
                    return answer.text
            raise ModelCallFailed("PERMANENT", "NO_WHOLE_ANSWER")

        return ask

    @property
    def _policy_version(self) -> str:
        return POLICY_VERSIONS[self._policy.decision]


def _embed_key(job: Job, text: str, embedder: str) -> str:
    return call_key(job, "embed", text, embedder)


class _Budget:
    """Model calls that one try of a job may still make."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self) -> None:
        if self._left <= 0:
            raise ModelCallFailed("TRANSIENT", "CALL_BUDGET_USED_UP")
        self._left -= 1
