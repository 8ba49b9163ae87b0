"""A worker's part in a job whose workers come and go."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d as c10d

from reducer import _core, _door, errors
from reducer._door import Calls
from reducer.backend import choose_bind_host, load_native, watching
from reducer.elastic import _handover
from reducer.elastic._decision import Action, Phase, Standing
from reducer.elastic._gradients import Gradients
from reducer.elastic._handover import Stateful
from reducer.elastic._record import SharedRecord, open_store
from reducer.elastic._rendezvous import EMPTY, FORM_S, FormingFailed, Generation, Rendezvous, Terms, Worker
from reducer.elastic._sampler import Sampler
from reducer.options import Options, resolve

log = logging.getLogger("reducer")

# Of generations that could not be formed, and of errors in one step without anybody lost, before it is given up.
_FORMINGS_MAX = 6
_FRUITLESS_MAX = 3
# Rank 0 looks for new workers no more often than that.
_LOOK_S = 0.25


@dataclass(frozen=True)
class Change:
    """What a session tells of a new set of workers. Workers are named "hostname:pid"."""

    generation: int
    step: int  # the step at hand
    rank: int  # of this worker, from now on
    world_size: int
    lost: tuple[str, ...]  # died, or did not come in time
    left: tuple[str, ...]  # left in good order
    joined: tuple[str, ...]
    action: str  # what becomes of the step in flight: "go on", "commit", "average" or "retry"


class Session:
    """Data-parallel training that goes on while workers die and new ones come, in the processes that live.

        with elastic.Session(model, optimizer, "tcp://10.0.0.9:29400", min_workers=2) as session:
            for step in session.steps(1000):
                loss = loss_of(model(batch(step, session.rank, session.world_size)))
                loss.backward()
                if session.reduce():  # the gradients are the workers' average now
                    optimizer.step()

    The session takes DistributedDataParallel's place: give it the plain model. It makes the default process group, anew
    for each set of workers (a generation); groups beside it end with it, and `on_change` is where to make them again.
    Collectives of your own in the loop raise DistBackendError when a worker is lost: catch that around them, and go on
    to reduce().

    Thread safety: one thread; backward may be another. One session at a time in a process.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        rendezvous: str | Store | None = None,
        *,
        state: Mapping[str, Stateful] | None = None,
        job: str = "default",
        min_workers: int = 1,
        max_workers: int | None = None,
        on_loss: str = "retry",
        timeout: float = 60.0,
        patience: float = 600.0,
        last_call: float = 1.0,
        bucket_bytes: int = 25 << 20,
        pg_options: Options | None = None,
        on_change: Callable[[Change], None] | None = None,
    ) -> None:
        """Does nothing yet but look at its arguments; `with` joins the job. Times are in seconds.

        rendezvous: a store that outlives the workers: "tcp://host:port" of `reducer rendezvous`, "file:///path" on one
            host, a torch store; under torchrun None is its agent's.
        state: what else a new worker gets from the others, by name: objects with state_dict() and load_state_dict(), as
            a learning-rate scheduler or a Sampler. Changed by you only after reduce() returned True.
        job: tells jobs in one store apart; the same on all workers, as all that follows.
        min_workers, max_workers: with fewer the job waits; more than the maximum wait (None: no maximum).
        on_loss: "retry": a step that a worker is lost in is computed again by the others, from its start; "average":
            the gradients that the others have of it are averaged without the lost one's.
        timeout: longest that a worker may keep the others waiting, in a collective or in finding each other.
        patience: longest to wait for the minimum, and for a new worker to be let in.
        last_call: at the start of the job with at least the minimum, how long to wait for one more.
        bucket_bytes: of the gradients that are reduced at a time.
        pg_options: as for init_process_group.
        on_change: told each set of workers, the first one too, before the step that it begins with.

        Raises InvalidArgumentError.
        """
        if on_loss not in ("retry", "average"):
            raise errors.InvalidArgumentError(f"on_loss: '{on_loss}' is neither 'retry' nor 'average'")
        if min_workers < 1 or (max_workers is not None and max_workers < min_workers):
            raise errors.InvalidArgumentError(
                f"min_workers {min_workers} must be at least 1, and max_workers ({max_workers}) no less"
            )
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise errors.InvalidArgumentError("model: give the session the model itself, not DistributedDataParallel")
        self._model = model
        self._optimizer = optimizer
        self._rendezvous_at = rendezvous
        self._state = dict(state or {})
        self._job = job
        self._terms = Terms(on_loss, min_workers, max_workers or 0)
        self._timeout = timeout
        self._patience = patience
        self._last_call = last_call
        self._bucket_bytes = bucket_bytes
        self._pg_options = pg_options
        self._on_change = on_change
        self._me = Worker(secrets.token_hex(8), _core.host_label(), "")
        self._step = 0
        self._phase = Phase.BOUNDARY
        self._new = True  # has no state of the job
        self._in_step = False
        self._change_wanted = False
        self._fruitless = 0
        self._blind = False  # the store is gone: nobody can come or go
        self._next_look = 0.0
        self._finished = False
        self._used = False
        self._dealt = (0, 1)  # rank and world size of the step at hand
        self._snapshot: dict[str, Any] = {}
        self._generation: Generation | None = None
        for one in self._state.values():
            if isinstance(one, Sampler):
                one.bind(lambda: self._dealt)

    # ------------------------------------------------------------ what the user sees

    @property
    def rank(self) -> int:
        """Of this worker in the set at hand, from 0."""
        return self._at.rank

    @property
    def world_size(self) -> int:
        return len(self._at.members)

    @property
    def generation(self) -> int:
        """Which set of workers is at work, counted from 1."""
        return self._at.number

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._step

    def __enter__(self) -> Session:
        """Joins the job: waits until the others take this worker in, and gets the state from one of them.

        Raises UnavailableError (the store cannot be reached; nobody has the state any more), TimeoutError (too few, or
        not let in), MismatchError (told otherwise than the others), AbortedError (the job is over),
        InvalidArgumentError.
        """
        if dist.is_initialized():
            raise errors.InvalidArgumentError("there is a default process group already; the session makes its own")
        if self._used:
            raise errors.InvalidArgumentError("a session is used once; make another one")
        self._used = True
        load_native()  # which takes a moment, and others wait later on
        store, where = open_store(self._rendezvous_at, self._patience)
        self._store = PrefixStore(f"elastic/{self._job}", store)
        door = _door.door_at(choose_bind_host(store, resolve(self._pg_options)))
        self._me = Worker(self._me.uid, self._me.host, door.address)
        self._rendezvous = Rendezvous(
            SharedRecord(self._store, where, EMPTY),
            self._me,
            door,
            self._terms,
            timeout_s=self._timeout,
            patience_s=self._patience,
            last_call_s=self._last_call,
            where=where,
        )
        self._gradients = Gradients(self._model, self._bucket_bytes)
        try:
            self._regroup()
        except BaseException:
            self._leave(over=False, failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(over=error is None and self._finished, failed=error is not None)

    def steps(self, count: int) -> Iterator[int]:
        """The numbers of the steps from the first that the job has not done to `count` - 1, equal on all workers.

        A number comes again when its step has to be done again. Clears the model's gradients before each. Every step
        must call reduce() once. Raises as `__enter__` does.
        """
        self._finished = False
        while True:
            if self._change_wanted and self._step < count:
                self._regroup()
            if self._step >= count:
                break
            self._begin_step()
            yield self._step
            if self._in_step:
                raise errors.InvalidArgumentError(f"step {self._step} did not call session.reduce()")
        self._finished = True

    def reduce(self) -> bool:
        """Averages the gradients of the step at hand over the workers, and gives all the buffers of rank 0.

        True: the model's `.grad` hold the average, to the bit the same on all workers: clip it, have the optimizer
        apply it. False: workers were lost, and the step is to be done again: go on to the next turn of the loop. Raises
        as `__enter__` does; DistBackendError for what is no loss of a worker.
        """
        if not self._in_step:
            raise errors.InvalidArgumentError("reduce() belongs into the loop over session.steps(), once in each step")
        while True:
            try:
                self._gradients.finish()
                self._phase = Phase.REDUCED
                self._vote()
            except dist.DistBackendError as error:
                action = self._recover(error)
                if action is None:
                    return False
                if action == Action.AVERAGE:
                    self._phase = Phase.BEGUN
                    self._gradients.again()
                    continue
            break
        self._commit()
        return True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """For gradient accumulation: around all but the last backward of a step."""
        self._gradients.paused = True
        try:
            yield
        finally:
            self._gradients.paused = False

    # ------------------------------------------------------------ a step

    @property
    def _at(self) -> Generation:
        if self._generation is None:
            raise errors.InvalidArgumentError("the session is not joined: use it by `with`")
        return self._generation

    def _begin_step(self) -> None:
        # What forward changes on the way to a gradient, and a step that is done again must find as it was.
        self._snapshot = {
            "buffers": [buffer.detach().clone() for buffer in self._model.buffers()],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
        }
        self._model.zero_grad(set_to_none=True)
        self._dealt = (self.rank, self.world_size)
        self._phase = Phase.BEGUN
        self._in_step = True
        self._gradients.begin()

    def _restore(self) -> None:
        for buffer, before in zip(self._model.buffers(), self._snapshot["buffers"], strict=True):
            buffer.detach().copy_(before)
        torch.set_rng_state(self._snapshot["torch"])
        random.setstate(self._snapshot["python"])

    def _vote(self) -> None:
        """All have the average, or this raises; and all learn whether the workers are to change."""
        wanted = self.rank == 0 and self._somebody_waits()
        vote = torch.tensor([int(wanted), self._step, -self._step])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if int(vote[1]) != -int(vote[2]):
            raise errors.InternalError(f"workers are at different steps: {-int(vote[2])} to {int(vote[1])}")
        self._change_wanted = bool(vote[0])

    def _somebody_waits(self) -> bool:
        if self._blind or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        try:
            return self._rendezvous.somebody_waits()
        except (errors.UnavailableError, errors.MismatchError) as error:
            self._blind = True
            log.warning("reducer: elastic: %s. Training goes on; the next loss of a worker ends it", error)
            return False

    def _commit(self) -> None:
        self._gradients.apply()
        for one in self._state.values():
            if isinstance(one, Sampler):
                one.advance()
        self._step += 1
        self._phase = Phase.BOUNDARY
        self._in_step = False
        self._fruitless = 0

    # ------------------------------------------------------------ changes

    def _recover(self, error: Exception) -> Action | None:
        """Finds a new set of workers after an error; what becomes of the step at hand, None if it was dropped."""
        members = set(self._at.members)
        log.info("reducer: elastic: step %d: %s", self._step, error)
        self._end_group(abort=True)
        action = self._regroup(error)
        self._fruitless = self._fruitless + 1 if set(self._at.members) == members else 0
        if self._fruitless >= _FRUITLESS_MAX:
            raise error
        return action if self._in_step else None

    def _regroup(self, error: Exception | None = None) -> Action:
        """Joins the next generation, forms its group and gets or hands over the state; what becomes of the step.

        A step that is to be done again is dropped, here and not by the caller: the next generation may be needed before
        this one works, and there this worker stands between two steps.
        """
        lost: list[str] = []
        left: list[str] = []
        joined: set[str] = set()
        for _ in range(_FORMINGS_MAX):
            self._end_group(abort=error is not None)
            number = self._generation.number if self._generation is not None else 0
            standing = None if self._new else Standing(self._step, self._phase)
            at = self._rendezvous.arrive(number, standing)
            stranger = at.rank in at.new
            self._generation = at
            lost += at.lost
            left += at.left
            joined |= {at.members[rank].host for rank in at.new}
            if stranger:
                self._new = True
                self._drop_step()
            try:
                self._form(at)
                if at.action == Action.RETRY and self._in_step:
                    self._drop_step()
                    self._restore()
                self._hand_over(at)
            except (FormingFailed, dist.DistBackendError, errors.TimeoutError, errors.UnavailableError) as failure:
                log.info("reducer: elastic: generation %d did not form: %s", at.number, failure)
                error = error or failure
                continue
            # (Workers that catch up with others that have left need not be the minimum for it.)
            self._change_wanted = len(at.members) < self._terms.min_workers
            change = Change(
                at.number, at.step, at.rank, len(at.members), tuple(lost), tuple(left), tuple(sorted(joined)),
                at.summary.value,
            )  # fmt: skip
            if at.rank == 0:
                _tell(change, self._me.host, error)
            if self._on_change is not None:
                self._on_change(change)
            return at.action
        raise errors.UnavailableError(f"no set of workers held for long enough to go on: {error}")

    def _form(self, at: Generation) -> None:
        self._rendezvous.confirm(at)
        c10d._world.group_count = 0  # of attempts that failed, which may differ among the workers
        with Calls[int]() as calls, watching(lambda: _ended(at, calls)):
            calls.watch({rank: member.door for rank, member in enumerate(at.members) if rank != at.rank})
            dist.init_process_group(
                "reducer",
                store=PrefixStore(f"group/{at.number}", self._store),
                rank=at.rank,
                world_size=len(at.members),
                timeout=timedelta(seconds=min(FORM_S, self._timeout)),
                pg_options=self._pg_options,
            )
            dist.barrier()  # all of them are connected before a call has more time
        group: Any = dist.group.WORLD
        group.set_timeout(timedelta(seconds=self._timeout))

    def _drop_step(self) -> None:
        self._gradients.abandon()
        self._in_step = False
        self._phase = Phase.BOUNDARY

    def _hand_over(self, at: Generation) -> None:
        if at.source is None:
            return
        held = None
        if at.rank == at.source:
            held = _handover.collect(self._model, self._optimizer, self._state)
        got = _handover.exchange(held, at.source, wanted=at.rank in at.new)
        if got is not None:
            # At the start of the job each keeps its own seed.
            _handover.load(got, self._model, self._optimizer, self._state, randomness=at.step > 0)
        if at.rank in at.new:
            self._step = at.step
            self._new = False
        if at.rank == at.source:
            self._rendezvous.begun()

    def _end_group(self, *, abort: bool) -> None:
        """The others get an error from what they still do in it, and come."""
        if not dist.is_initialized():
            return
        if abort:
            group: Any = dist.group.WORLD
            with suppress(RuntimeError):
                group.abort()
        dist.destroy_process_group()

    def _leave(self, *, over: bool, failed: bool) -> None:
        self._gradients.close()
        standing = None if self._new else Standing(self._step, self._phase)
        with suppress(errors.ReducerError):
            self._rendezvous.leave(standing, over=over)
        self._end_group(abort=failed)
        self._generation = None


def _ended(at: Generation, calls: Calls[int]) -> dict[int, str]:
    """Members whose processes have ended, by rank."""
    calls.step(0.0)
    return {rank: at.members[rank].host for rank in calls.dead()}


def _tell(change: Change, host: str, error: Exception | None) -> None:
    """One line for each change, from `host`."""
    parts = []
    if change.lost:
        parts.append(f"lost {', '.join(change.lost)}")
    if change.left:
        parts.append(f"{', '.join(change.left)} left")
    if change.joined and change.generation > 1:
        parts.append(f"{', '.join(change.joined)} joined")
    if not parts:
        log.info("reducer: elastic: generation %d has %d workers", change.generation, change.world_size)
        return
    becomes = {
        Action.GO_ON.value: f"on with step {change.step}",
        Action.COMMIT.value: f"step {change.step} was whole already",
        Action.AVERAGE.value: f"step {change.step} is averaged over those that are left",
        Action.RETRY.value: f"step {change.step} is done again",
    }[change.action]
    why = f" ({host} saw: {error})" if error is not None and change.lost else ""
    log.warning(
        "reducer: elastic: generation %d: %s%s; %d workers go on, %s",
        change.generation, "; ".join(parts), why, change.world_size, becomes,
    )  # fmt: skip
