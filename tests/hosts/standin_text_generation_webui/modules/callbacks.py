from queue import Queue
from threading import Thread

from modules import shared


class StopNowException(Exception):
    pass


class Iteratorize:
    """Runs ``func`` in a thread of its own, and gives what its callback is called with."""

    def __init__(self, func, args=None, kwargs=None, callback=None):
        self.q = Queue()
        self.stop_now = False

        def put(value):
            if self.stop_now or shared.stop_everything:
                raise StopNowException
            self.q.put((value,))

        def run():
            try:
                func(*(args or []), callback=put, **(kwargs or {}))
            except StopNowException:
                pass
            except Exception as error:
                shared.failure = error
            self.q.put(None)

        self.thread = Thread(target=run)
        self.thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        item = self.q.get()
        if item is None:
            raise StopIteration
        return item[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop_now = True
