"""One write at a time in a thread, so that training does not wait for the disk."""

from collections.abc import Callable
from threading import Thread

from remap.errors import starting_threads


class BackgroundWriter:
    """Runs a function in a thread. The thread is a daemon: a second signal does not wait for the disk."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is under way; ``finish`` returns at once then."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, write: Callable[[], None]) -> None:
        """Start a write; the one before has to be finished.

        Raises:
            ThreadRefused: The system starts no more threads.
        """
        assert self._thread is None, "finish() the write before"
        thread = Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        with starting_threads():
            thread.start()
        self._thread = thread

    def finish(self) -> Exception | None:
        """Wait for the write that was begun, if any; return what it raised."""
        if self._thread is not None:
            self._thread.join()
        # Returned, not raised: a disk that refuses does not end training (``Training.finish_writing``).
        error, self._thread, self._error = self._error, None, None
        return error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # for ``finish``, in the thread that trains
            self._error = error
