"""Captions by the actors of a Ray cluster. This process reads the images, and receives the rows in their order.

The images of an actor that ends, alone or with its machine, go to other actors. A new actor replaces it when there is
room. Ray's own retries would wait for that room, which is forever on a cluster that became smaller.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...models.errors import FastVLMError, ImageError, MachineError, ModelFolderError, UsageError
from ...models.images import file_bytes
from ..batch import BATCH_SIZE
from ..folder import open_folder
from .log import run_digest
from .pipeline import Row, loaded
from .ray_worker import Worker, WorkerSetup
from .sources import Item

if TYPE_CHECKING:
    from ..encoders import OnWait

LOCAL = "local"
"""The address of a cluster of this machine alone, which begins and ends with the run."""

TASKS_PER_ACTOR = 2
"""The tasks that an actor has: one that it works on, and one that waits, so that it never does."""

BATCHES_PER_TASK = 4
"""The batches of answers in a task. The batch shrinks at the end of each task, so short tasks would waste time."""

MAX_DEATHS = 3
"""The actors that one image, or the loading of the model, may end before it is taken for the reason."""

STORE_BYTES = 2**28
"""The object store per actor of a local cluster: its tasks with images of 4 MB. Ray writes more than that to disk."""

PROBE_SECONDS = 5.0
"""The longest wait for an address to accept a connection. Ray itself retries for many minutes."""

WAIT_SECONDS = 0.1
"""The longest wait for Ray at a time, in seconds. Ctrl-C must end a command within half a second."""


@dataclass(frozen=True)
class RemoteRow(Row):
    """A row that an actor made."""

    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> dict[str, Any]:
        return dict(self.content)


@dataclass
class Sent:
    """An image in work.

    Attributes:
        name: its name in errors, as the local engine has it.
        content: its bytes, until it is sent.
        entry: its row, once that is known.
    """

    key: str
    image: Path | bytes | None
    name: str = ""
    content: bytes = b""
    entry: Mapping[str, Any] | None = None


@dataclass
class Task:
    """Images that one actor answers, and their bytes in Ray's object store.

    Attributes:
        deaths: the actors that ended during this task. It is then a suspect, and alone in its actor: the reply to an
            earlier task can be lost with the actor, and that task would be blamed.
    """

    images: list[Sent]
    stored: Any
    deaths: int = 0


@dataclass
class Actor:
    """An actor of the pool. `opening` is the reference to the loading of its model, or None once it is loaded."""

    handle: Any
    opening: Any
    tasks: deque[tuple[Any, Task]] = field(default_factory=deque)
    """The references and tasks that were sent to it, in the order of its work."""

    def has_room(self, depth: int) -> bool:
        """Returns whether it is to have another task, with at most `depth` before it. None follows a suspect."""
        suspect = bool(self.tasks) and self.tasks[-1][1].deaths > 0
        return self.opening is None and len(self.tasks) <= depth and not suspect


class RayCaptioner:
    """Does what `pipeline.Captioner` does, with actors of a Ray cluster. Used as a context manager.

    It waits until the first actor has loaded the model. The others join when the cluster has room for them. `on_wait`
    is called several times a second meanwhile, with a message and the seconds so far.

    Args:
        folder: an exported model folder, with the same content at the same path on every machine.
        prompts, options, batch_size, workers: those of `pipeline.Captioner`.
        load: the arguments of `fastvlm.load`.
        address: `local`, `auto` for the cluster of this machine, or the address of a cluster.
        actors: the number of actors, each with a model.
        actor_cpus: the cores that an actor reserves, and the threads that it computes with.

    Attributes:
        lost: the actors that ended before the run did.

    Raises:
        MachineError: Ray is not installed, the cluster cannot be reached, or its machines cannot run fastvlm.
        ModelFolderError: the folder is incomplete, or differs between machines.
        FastVLMError: any error of `fastvlm.load`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        options: Mapping[str, Any],
        *,
        load: Mapping[str, Any] | None = None,
        address: str = LOCAL,
        actors: int = 1,
        actor_cpus: int = 1,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        require_ray()
        for name, count in (("actors", actors), ("actor_cpus", actor_cpus)):
            if count < 1:
                raise UsageError(f"{name} must be at least 1 (got {count})", name)
        opened = open_folder(folder).path.absolute()
        self.lost, self._reason = 0, ""
        self._notes: tuple[str, ...] = ()
        self._digest = run_digest(opened, (), {})
        self._setup = WorkerSetup(
            str(folder if not folder.is_dir() else opened), tuple(prompts), dict(options), dict(load or {}), batch_size,
            workers or actor_cpus,
        )  # fmt: skip
        self._count, self._cpus, self._batch_size = actors, actor_cpus, batch_size
        self._actors: list[Actor] = []
        self._failed_starts = 0
        self._connected = connect(address, actors, actor_cpus)
        try:
            for _ in range(actors):
                self._start()
            self._wait_for_first(on_wait)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayCaptioner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for a user: on the folder, and on actors that ended."""
        if not self.lost:
            return self._notes
        actors = "1 actor" if self.lost == 1 else f"{self.lost} actors"
        return (*self._notes, f"{actors} ended before the run did, and others captioned the images: {self._reason}")

    def close(self) -> None:
        """Ends the actors, and the local cluster if there is one."""
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors = []
        if self._connected:
            ray.shutdown()
            self._connected = False

    def rows(self, items: Iterable[Item]) -> Iterator[Row]:
        """Yields a row for each image, in their order. See `pipeline.Captioner.rows`."""
        flow = Flow(items, TASKS_PER_ACTOR * self._count, self._batch_size)
        while True:
            for depth in range(TASKS_PER_ACTOR):
                for actor in self._actors:
                    if actor.has_room(depth) and (task := flow.next_task(alone=not actor.tasks)) is not None:
                        actor.tasks.append((actor.handle.caption.remote(task.stored), task))
            yield from flow.finished()
            if flow.is_done:
                return
            self._receive(flow)

    def _receive(self, flow: Flow) -> None:
        """Waits for the next event of an actor for a short time, and handles it."""
        import ray

        events = {actor.opening: actor for actor in self._actors if actor.opening is not None}
        events |= {actor.tasks[0][0]: actor for actor in self._actors if actor.tasks}
        ready, _ = ray.wait(list(events), timeout=WAIT_SECONDS) if events else ([], [])
        for reference in ready:
            actor = events[reference]
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as reason:
                raise remote_error(reason) from None
            except ray.exceptions.RayError as reason:
                self._replace(actor, flow, first_line(reason))
                continue
            if reference is actor.opening:
                self._opened(actor, *result)
            else:
                _, task = actor.tasks.popleft()
                for image, entry in zip(task.images, result, strict=True):
                    image.entry, image.content = entry, b""

    def _start(self) -> None:
        import ray

        options = {"num_cpus": self._cpus, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        handle: Any = ray.remote(Worker).options(**options).remote()
        self._actors.append(Actor(handle, handle.open.remote(self._setup)))

    def _opened(self, actor: Actor, version: str, digest: str, host: str, notes: tuple[str, ...]) -> None:
        """Notes that an actor has its model. Raises an error if it is not the same one."""
        if version != __version__:
            raise MachineError(
                f"{host} has fastvlm {version}, and this machine {__version__}. Install the same version on both."
            )
        if digest != self._digest:
            raise ModelFolderError(f"{self._setup.folder} on {host} differs from the one here. Copy the same folder.")
        actor.opening, self._failed_starts = None, 0
        self._notes = tuple(dict.fromkeys((*self._notes, *notes)))

    def _replace(self, actor: Actor, flow: Flow | None, reason: str) -> None:
        """Removes an actor that ended, gives its tasks back, and starts another one."""
        import ray

        self._actors.remove(actor)
        ray.kill(actor.handle)
        self.lost, self._reason = self.lost + 1, reason
        if actor.opening is not None:
            self._failed_starts += 1
            if self._failed_starts == MAX_DEATHS:
                raise MachineError(f"actors end while they load the model: {reason}. Look at their logs in /tmp/ray.")
        if flow is not None:
            flow.give_back([task for _, task in actor.tasks], reason)
        self._start()

    def _wait_for_first(self, on_wait: OnWait | None) -> None:
        begin = time.perf_counter()
        idle = Flow((), 0, 1)
        while all(actor.opening is not None for actor in self._actors):
            self._receive(idle)
            if on_wait is not None and (seconds := time.perf_counter() - begin) > 2:
                on_wait("waiting for the first actor of the Ray cluster", seconds)


class Flow:
    """The images of a run between their source and their rows.

    Images are read while fewer than `2 * tasks` full tasks are in work, so memory does not depend on their number. The
    first tasks are small, so that few images are spread over all actors.
    """

    def __init__(self, items: Iterable[Item], tasks: int, batch_size: int) -> None:
        self._items: Iterator[Item] | None = iter(items)
        self._tasks, self._batch_size = tasks, batch_size
        self._order: deque[Sent] = deque()
        self._returned: deque[Task] = deque()
        self._made = 0

    @property
    def is_done(self) -> bool:
        """True if every image has its row."""
        return self._items is None and not self._order

    def finished(self) -> Iterator[Row]:
        """Yields the rows that are complete, up to the first that is not."""
        while self._order and self._order[0].entry is not None:
            image = self._order.popleft()
            assert image.entry is not None
            yield RemoteRow(image.key, image.image, error=image.entry.get("error"), content=image.entry)

    def next_task(self, alone: bool) -> Task | None:
        """Returns the next task: one that was given back, or new images. None if there is nothing to do now.

        Only with `alone` it may be a suspect.
        """
        import ray

        if self._returned:
            return self._returned.popleft() if alone or not self._returned[0].deaths else None
        if self._items is None or len(self._order) >= 2 * self._tasks * BATCHES_PER_TASK * self._batch_size:
            return None
        size = self._batch_size * min(BATCHES_PER_TASK, 1 + self._made // self._tasks)
        images: list[Sent] = []
        while len(images) < size:
            item = next(self._items, None)
            if item is None:
                self._items = None
                break
            sent = read(item)
            self._order.append(sent)
            if sent.entry is None:
                images.append(sent)
        if not images:
            return None
        self._made += 1
        return Task(images, ray.put(contents(images)))

    def give_back(self, tasks: Sequence[Task], reason: str) -> None:
        """Returns the tasks of an actor that ended to the next ones. It worked on the first of them.

        A task that ended two actors is divided into images. An image that ended MAX_DEATHS gets an error.
        """
        given = list(tasks)
        if given:
            given[0].deaths += 1
        parts = [part for task in given for part in self._divided(task, reason)]
        self._returned.extendleft(reversed(parts))

    def _divided(self, task: Task, reason: str) -> list[Task]:
        import ray

        if task.deaths < MAX_DEATHS - 1:
            return [task]
        if len(task.images) > 1:
            stored = ray.get(task.stored)
            return [Task([image], ray.put([one]), task.deaths) for image, one in zip(task.images, stored, strict=True)]
        if task.deaths < MAX_DEATHS:
            return [task]
        (image,) = task.images
        image.entry = {"error": f"{image.name} ended {MAX_DEATHS} actors: {reason}."}
        return []


def read(item: Item) -> Sent:
    """Returns an image with its bytes, or with the row of an image that cannot be read."""
    key, image = loaded(item)
    if isinstance(image, ImageError):
        return Sent(key, None, entry={"error": str(image)})
    if isinstance(image, bytes):
        return Sent(key, image, key, image)
    try:
        return Sent(key, image, str(image), file_bytes(image))
    except ImageError as reason:
        return Sent(key, image, entry={"error": str(reason)})


def contents(images: Sequence[Sent]) -> list[tuple[str, bytes]]:
    """Returns the names and bytes of images, which then have them in Ray's store alone."""
    found = [(image.name, image.content) for image in images]
    for image in images:
        image.content = b""
    return found


def require_ray() -> None:
    """Raises MachineError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MachineError("engine='ray' needs Ray, which is missing. Run `pip install \"fastvlm[ray]\"`.", "engine")


def connect(address: str, actors: int, actor_cpus: int) -> bool:
    """Connects this process to a cluster, or starts a local one. Returns False if it was connected before.

    Ray's messages are for its own logs. Usage statistics are off unless RAY_USAGE_STATS_ENABLED turns them on.

    Raises:
        MachineError: the address has no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    ray._private.worker._worker_logs_enabled = False  # Ray prints about lost machines on stdout, whatever its options
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = max(os.cpu_count() or 1, actors * actor_cpus)
        quiet |= {"num_cpus": cores, "object_store_memory": actors * STORE_BYTES, "include_dashboard": False}
    else:
        check_address(address)
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as reason:
        raise no_cluster(address, first_line(reason)) from None
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)  # Ray sets its own, which exits at once
    return True


def check_address(address: str) -> None:
    """Raises MachineError unless something accepts connections at the address of a cluster."""
    from ray._private.services import canonicalize_bootstrap_address  # also reads RAY_ADDRESS, and finds `auto`

    if "://" in address:
        raise no_cluster(address, "it must be local, auto or HOST:PORT, on a machine of the cluster")
    try:
        found = canonicalize_bootstrap_address(address)
        if found is None:
            raise no_cluster(address, "none runs on this machine")
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    except ValueError as reason:
        raise no_cluster(address, first_line(reason)) from None
    except OSError as reason:
        raise no_cluster(address, reason.strerror or first_line(reason)) from None


def no_cluster(address: str, reason: str) -> MachineError:
    """Returns the error of an address without a cluster."""
    return MachineError(
        f"address={address!r} has no Ray cluster: {reason}. Start one with `ray start --head`.", "address"
    )


def remote_error(reason: Any) -> FastVLMError:
    """Returns the error that an actor raised: fastvlm's own, or one that quotes another kind."""
    cause = reason.cause
    if isinstance(cause, FastVLMError):
        return cause
    kind = type(cause).__name__ if cause is not None else "error"
    return MachineError(f"an actor failed: {kind}: {first_line(cause or reason)}")


def first_line(reason: BaseException) -> str:
    """Returns the first line of an exception's text, without its full stop."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return (lines[0] if lines else type(reason).__name__).rstrip(".")
