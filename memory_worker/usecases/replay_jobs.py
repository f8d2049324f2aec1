"""What a job would have decided by another policy, or by what models say now. Writes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from memory_worker.domain.decision import Action, Candidate, Plan, Verdict, decide
from memory_worker.domain.errors import JobNotFound
from memory_worker.domain.item import Fact
from memory_worker.domain.job import Job, call_key
from memory_worker.usecases.extraction import PROMPTS
from memory_worker.usecases.judging import Ask, Question, facts_of, verdicts_of
from memory_worker.usecases.memory_ports import Decision, DecisionStore, ItemStore
from memory_worker.usecases.ports import JobQueue, ModelCallFailed, ModelQuestion, Models, Policy, Turn
from servicekit.core.errors import DependencyUnavailable, InvalidField

MOST_LOST_ANSWERS = 20


@dataclass(frozen=True, slots=True)
class Replayed:
    """A decision and what would be made of its fact now. `decision` None = the fact was not found then, so no recall of
    it was written down and nothing can be said of what it would do. `found` False = the fact would not be found now."""

    fact: Fact
    decision: Decision | None
    plan: Plan
    same: bool
    found: bool = True
    verdicts: tuple[Verdict, ...] = ()


@dataclass
class Replay:
    """The decisions, the prompts they are by ("" = each by its own), and what asking anew cost."""

    decisions: list[Replayed] = field(default_factory=list)
    prompts: str = ""
    calls: int = 0
    tokens: int = 0
    credit_micros: int = 0


class JobReplayer:
    """From what was seen then: facts, recall, and verdicts unless they are asked for anew."""

    def __init__(
        self, jobs: JobQueue, items: ItemStore, decisions: DecisionStore, models: Models, *, policy: Policy,
        opened: Callable[[Job], Job],
    ) -> None:
        self._jobs = jobs
        self._items = items
        self._decisions = decisions
        self._models = models
        self._policy = policy
        self._opened = opened

    async def replay(
        self, job_id: UUID, *, policy: str = "", judge_again: bool = False, turn: Turn | None = None,
        billed_to: str = "",
    ) -> Replay:
        """`judge_again`: verdicts by the prompts in use now. `turn`: what was said, which is not kept once a job is
        done, to be understood by the prompt in use now. Questions are paid by `billed_to`, "" = the job's user. Raises
        JobNotFound, InvalidField, DependencyUnavailable, and what opening a sealed turn raises."""
        job = await self._jobs.get(job_id, "")
        if job is None:
            raise JobNotFound("there is no such job")
        asks = judge_again or turn is not None
        replay = Replay(prompts=PROMPTS if asks else "")
        ask = self._asker(job, billed_to or job.user_id, replay)
        made = await self._decisions.decisions_of(job.user_id, job_id)
        try:
            found = None if turn is None else await self._facts(ask, self._with_turn(job, turn))
            for each in made:
                replay.decisions.append(await self._again(ask, each, found, policy, judge_again))
        except ModelCallFailed as failure:
            raise DependencyUnavailable(f"a model's answer ({failure.reason})") from failure
        known = {each.fact.digest for each in made}
        replay.decisions += [
            Replayed(fact, None, Plan(Action.DROP if objection else Action.RETRY), same=False)
            for fact, objection in found or () if fact.digest not in known
        ]
        return replay

    def _with_turn(self, job: Job, turn: Turn) -> Job:
        if (turn.user_id, turn.message_id) != (job.user_id, job.message_id):
            raise InvalidField.of("turn", "must be the turn of the job")
        return self._opened(replace(job, turn=turn.text, occurred_at=turn.occurred_at))

    async def _facts(self, ask: Ask, job: Job) -> list[tuple[Fact, str]]:
        settings = await self._items.settings(job.user_id)
        shown = await self._items.contents_of(job.user_id, job.turn.memory_ids)
        return await facts_of(ask, job, settings=settings, policy=self._policy, shown=shown)

    async def _again(
        self, ask: Ask, made: Decision, found: Sequence[tuple[Fact, str]] | None, policy: str, judge_again: bool
    ) -> Replayed:
        now = None if found is None else {fact.digest: objection for fact, objection in found}
        if now is not None and made.fact.digest not in now:
            return Replayed(made.fact, made, Plan(Action.DROP), same=made.action is Action.DROP, found=False)
        if made.reason != "COMPARED" or (now is not None and now[made.fact.digest]):
            action = Action.DROP if now is not None and now[made.fact.digest] else made.action
            return Replayed(made.fact, made, Plan(action), same=action is made.action)
        verdicts = made.verdicts
        if judge_again:
            candidates = [Candidate(each.item_id, each.version, each.content, each.score) for each in made.verdicts]
            verdicts = tuple(await verdicts_of(ask, made.fact, candidates, self._policy))
        plan = decide(policy or self._policy.decision, verdicts)
        then = decide(made.policy.partition("/")[0], made.verdicts)
        return Replayed(made.fact, made, plan, same=plan == then, verdicts=verdicts)

    def _asker(self, job: Job, payer: str, replay: Replay) -> Ask:
        """The same question is the same call, so that a replay that is repeated is charged once while llm_service keeps
        its answers; an answer that is gone, or was cut, is asked for under another name."""
        async def ask(question: Question) -> str:
            digest = hashlib.sha256(question.data.encode()).hexdigest()
            for again in range(MOST_LOST_ANSWERS):
                key = call_key(job, "replay", payer, question.stage, *question.parts, digest, again)
                try:
                    answer = await self._models.ask(ModelQuestion(
                        key, payer, question.scene, question.alias, question.instructions, question.data,
                        f"memory_{question.stage}", question.schema,
                    ))
                except ModelCallFailed as failure:
                    if failure.kind == "GONE":
                        continue
                    raise
                replay.calls += 1
                replay.tokens += answer.tokens
                replay.credit_micros += answer.credit_micros
                if answer.text:
                    return answer.text
            raise ModelCallFailed("PERMANENT", "NO_WHOLE_ANSWER")

        return ask
