"""The only mutable state: the engine in use, the folder's entries, the selection and its effect.

A session holds one immutable state, which a change replaces whole. Readers take the state as it is and
wait for nobody. Changes take turns under one lock, which is held while files are read, never while a
model runs or a listener is called.
"""

import hashlib
import logging
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    MutableMapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from .catalogue import Catalogue, Entry
from .compatibility import ModelFacts, Verdict, judge
from .engines import Engine
from .errors import (
    CompatibilityError,
    ContextExceeded,
    EngineError,
    NoModel,
    SelectionError,
    SoftPromptError,
    UnknownSoftPrompt,
)
from .softprompt import SoftPrompt
from .watch import Watcher, watch

log = logging.getLogger(__name__)

Listener = Callable[[Dict[str, Any]], None]

_REFUSALS = {Verdict.NO_MODEL: NoModel, Verdict.INCOMPATIBLE: CompatibilityError}
"""The error that a verdict becomes where its file is asked for; for any other, :class:`SelectionError`."""

MOST_SELECTED = 64
"""Soft prompts at once; far more than any context has room for."""

_CLOSING_SECONDS = 10
"""How long closing waits for a measurement; past that it is left to end by itself."""


class _Selected(NamedTuple):
    filename: str
    header: Any
    """The entry's header when the file was loaded: the catalogue makes another when the file changes."""
    softprompt: SoftPrompt
    digest: str
    """Of the content; an effect belongs to it."""


class _State(NamedTuple):
    engine: Optional[Engine] = None
    facts: Optional[ModelFacts] = None
    entries: Tuple[Entry, ...] = ()
    selected: Tuple[_Selected, ...] = ()
    effect: Optional[float] = None
    notice: str = ""

    @property
    def softprompts(self) -> Tuple[SoftPrompt, ...]:
        return tuple(each.softprompt for each in self.selected)

    @property
    def content(self) -> str:
        return " ".join(each.digest for each in self.selected)


class Session:
    """A folder of soft prompts, the engine in use and what is selected; safe to use from any thread."""

    def __init__(self, folder: Union[str, Path], engine: Optional[Engine] = None):
        self.catalogue = Catalogue(folder)
        self._lock = threading.Lock()
        self._state = _State()
        self._effects: MutableMapping[Engine, Dict[str, Optional[float]]] = weakref.WeakKeyDictionary()
        self._measuring: Optional[threading.Thread] = None
        self._watcher: Optional[Watcher] = None
        self._listeners: Tuple[Listener, ...] = ()
        self._listing: Tuple[Tuple[Entry, ...], List[Dict[str, Any]]] = ((), [])
        self._closed = False
        self.use(engine)

    @property
    def engine(self) -> Optional[Engine]:
        """The engine in use, or None: none was given, or its model no longer exists."""
        engine = self._state.engine
        return engine if engine is not None and engine.alive else None

    @property
    def takes_softprompts(self) -> bool:
        """Whether there is a model and its backend can use soft prompts."""
        facts = self._state.facts
        return self.engine is not None and facts is not None and facts.refusal is None

    @property
    def selection(self) -> Tuple[str, ...]:
        """File names of what is selected, in order."""
        return tuple(each.filename for each in self._state.selected)

    @property
    def softprompts(self) -> Tuple[SoftPrompt, ...]:
        """What is selected, in order: a snapshot that no later change touches."""
        return self._state.softprompts

    @property
    def n_tokens(self) -> int:
        """Tokens of the context that the selection uses."""
        return sum(softprompt.n_tokens for softprompt in self._state.softprompts)

    @property
    def effect(self) -> Optional[float]:
        """How far the selection moves the next-token distribution, 0 to 1; None until it is measured."""
        return self._state.effect

    def entries(self) -> Tuple[Entry, ...]:
        """Every file of the folder as it is now, with its verdict for the model in use."""
        self.refresh()
        return self._state.entries

    def use(self, engine: Optional[Engine]) -> None:
        """Change the engine in use, or to none; every verdict changes with it.

        The selection is kept while there is no model, and given to the new engine if that can use all of
        it; if not, it is cleared and the notice says why.
        """
        facts = engine.facts() if engine is not None else None  # reads weights: before the lock is taken
        with self._changing() as state:
            if state.engine is not None and state.engine is not engine:
                state.engine.select(())
            selected, notice = state.selected, state.notice
            if engine is not None:
                try:
                    _check(selected, facts)
                    engine.select([each.softprompt for each in selected])
                except SoftPromptError as error:
                    notice = f"Taken off, since {engine.name} cannot use it: {error}"
                    selected = ()
            self._state = _State(engine, facts, self.catalogue.entries(facts), selected, notice=notice)

    def select(self, filenames: Union[str, Sequence[str]]) -> None:
        """Change the selection to one file, or to several in order; "" or none clears it.

        Everything is checked first: on any error the old selection stays. Raises
        :class:`UnknownSoftPrompt`, :class:`NoModel`, another :class:`SelectionError`, or a
        :class:`CompatibilityError`.
        """
        names = [filenames] if isinstance(filenames, str) else [name for name in filenames if name != ""]
        if len(names) > MOST_SELECTED:
            raise SelectionError(f"{len(names)} soft prompts at once; at most {MOST_SELECTED} can be selected")
        with self._changing() as state:
            known = self._by_name(state)
            selected = tuple(self._load(name, state, known) for name in names if name != "")
            _check(selected, state.facts)
            if state.engine is not None:
                state.engine.select([each.softprompt for each in selected])
                effects = self._effects.get(state.engine, {})
                for content in [content for content, effect in effects.items() if effect is None]:
                    del effects[content]  # what could not be measured is tried again
            entries = self.catalogue.entries(state.facts)
            self._state = state._replace(entries=entries, selected=selected, notice="")

    def clear(self, notice: str = "") -> None:
        """Change the selection to none; ``notice`` tells why, where it was not the user's choice."""
        self.select(())
        if notice:
            with self._changing() as state:
                self._state = state._replace(notice=notice)

    def softprompt(self, filename: str) -> SoftPrompt:
        """One file's soft prompt, for one request; the selection stays. Raises what :meth:`select` raises."""
        with self._changing() as state:
            loaded = self._load(filename, state, self._by_name(state))
            _check((loaded,), state.facts)
            return loaded.softprompt

    def named(self, name: str) -> Optional[SoftPrompt]:
        """What a tag names, by its file or its own name, for one request; None: there is none of the name.

        Raises what :meth:`softprompt` raises, and :class:`UnknownSoftPrompt` where several have the name.
        """
        filename = self.catalogue.filename_of(name)
        return None if filename is None else self.softprompt(filename)

    def refresh(self) -> None:
        """Read the folder again: what changed has a new entry, and the selection follows its files.

        A selected file that was replaced is loaded again; one that was deleted, or that does not fit any
        more, is taken off. One that cannot be read, perhaps because it is still being copied, stays as it was
        loaded. The notice says so, until the folder changes again.
        """
        with self._changing() as state:
            entries = self.catalogue.entries(state.facts)
            by_name = {entry.filename: entry for entry in entries}
            selected: List[_Selected] = []
            notice = state.notice if entries is state.entries else ""
            for each in state.selected:
                entry = by_name.get(each.filename)
                if entry is None:
                    notice = f"{each.filename} is no longer in the folder, and was taken off."
                elif entry.header is each.header:
                    selected.append(each)
                elif entry.verdict is Verdict.UNREADABLE:
                    selected.append(each)
                    notice = f"{each.filename} cannot be read now; what was loaded before stays in use."
                else:
                    try:
                        loaded = self._load(each.filename, state, by_name, without_model=True)
                        selected.append(loaded)
                        if loaded.digest != each.digest:
                            notice = f"{each.filename} was replaced; the new file is in use."
                    except SoftPromptError as error:
                        notice = f"Changed, and taken off: {error}"
            if tuple(selected) != state.selected and state.engine is not None:
                try:
                    _check(selected, state.facts)
                    state.engine.select([each.softprompt for each in selected])
                except SoftPromptError as error:
                    notice = f"Changed, and taken off: {error}"
                    selected = []
                    state.engine.select(())
            if tuple(selected) != state.selected:  # loading may have found what listing could not
                entries = self.catalogue.entries(state.facts)
            self._state = state._replace(entries=entries, selected=tuple(selected), notice=notice)

    def status(self) -> Dict[str, Any]:
        """The whole state as JSON holds it: the payload of the ``softprompts`` event."""
        state, engine = self._state, self.engine
        return {
            "model": engine.name if engine is not None else "",
            "context": engine.context if engine is not None else None,
            "selection": [each.filename for each in state.selected],
            "n_tokens": sum(softprompt.n_tokens for softprompt in state.softprompts),
            "effect": state.effect,
            "notice": state.notice or getattr(state.effect, "remark", ""),
            "entries": [dict(entry) for entry in self._listed(state.entries)],
        }

    def _listed(self, entries: Tuple[Entry, ...]) -> List[Dict[str, Any]]:
        """The entries as JSON holds them; made once, as the catalogue gives the same tuple until one changes."""
        known = self._listing
        if known[0] is not entries:
            known = self._listing = (entries, [entry_as_json(entry) for entry in entries])
        return known[1]

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have ``listener`` called with the status after every change, from the thread that made it.

        Two changes at once may call it in either order; :meth:`status` is always the newest. What is
        returned ends the subscription.
        """
        with self._lock:
            self._listeners += (listener,)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return unsubscribe

    def watch(self) -> None:
        """Refresh by itself whenever the folder changes, until closed; starts the watcher's thread."""
        started: Optional[Watcher] = watch(self.catalogue.folder, self.refresh)
        with self._lock:
            if self._watcher is None and not self._closed:
                self._watcher, started = started, None
        if started is not None:  # it was watched already, or is closed
            started.close()

    def close(self) -> None:
        """Stop watching and measuring; nobody is told of anything any more."""
        with self._lock:
            self._closed = True
            self._listeners = ()
            watcher, self._watcher = self._watcher, None
            measuring = self._measuring
        if watcher is not None:
            watcher.close()
        if measuring is not None and measuring is not threading.current_thread():
            measuring.join(_CLOSING_SECONDS)

    @contextmanager
    def _changing(self) -> Iterator[_State]:
        """Hold the lock around one change of ``_state``; afterwards, also where it failed, tell the listeners."""
        before = after = None
        try:
            with self._lock:
                before = self._state
                if before.engine is not None and not before.engine.alive:
                    self._state = before._replace(engine=None, facts=None, effect=None)
                try:
                    yield self._state
                finally:
                    self._recall_effect()
                    after = self._state
        finally:
            if after != before:
                for listener in self._listeners:
                    try:
                        listener(self.status())
                    except Exception:  # one listener's fault must not keep the news from the others
                        log.exception("A listener failed")

    def _by_name(self, state: _State) -> Dict[str, Entry]:
        return {entry.filename: entry for entry in self.catalogue.entries(state.facts)}

    def _load(self, filename: str, state: _State, known: Dict[str, Entry], without_model: bool = False) -> _Selected:
        """The file as something selected; with the lock held."""
        if not isinstance(filename, str):
            raise UnknownSoftPrompt(f"{filename!r} is not a file name.")
        entry = known.get(filename) or self.catalogue.entry(filename, state.facts)  # which says what is wrong
        for each in state.selected:
            if each.filename == filename and each.header is entry.header:
                return each
        unproblematic = entry.verdict.usable or (without_model and entry.verdict is Verdict.NO_MODEL)
        if not unproblematic:
            raise _REFUSALS.get(entry.verdict, SelectionError)(f"{filename}: {entry.reason}")
        try:
            softprompt = self.catalogue.load(filename)
        except SoftPromptError:
            self._state = self._state._replace(entries=self.catalogue.entries(state.facts))
            raise
        except OSError as error:
            raise SelectionError(f"{filename} cannot be read: {error.strerror or error}") from error
        digest = hashlib.sha256(softprompt.rows.tobytes())
        digest.update(f"{softprompt.scale} {softprompt.order} {softprompt.rows.shape}".encode())
        return _Selected(filename, entry.header, softprompt, digest.hexdigest())

    def _recall_effect(self) -> None:
        """Set the state's effect to what was measured for this content and engine, or have it measured; lock held."""
        state = self._state
        effect = None
        if state.engine is not None and state.selected:
            known = self._effects.setdefault(state.engine, {})
            effect = known.get(state.content)
            if state.content not in known and self._measuring is None and not self._closed:
                self._measuring = threading.Thread(target=self._measure, name="softprompt-effect", daemon=True)
                self._measuring.start()
        if effect != state.effect:
            self._state = state._replace(effect=effect)

    def _measure(self) -> None:
        """Measure the selection's effect until there is none left unmeasured; in a thread of its own."""
        while True:
            with self._lock:
                state = self._state
                known = self._effects.get(state.engine, {}) if state.engine is not None else {}
                if self._closed or state.engine is None or not state.selected or state.content in known:
                    self._measuring = None
                    return
            notice = ""
            try:
                effect: Optional[float] = state.engine.effect(state.softprompts)
            except Exception as error:  # a number that is missing must not stop the story
                if self._state.engine is state.engine:  # else the model was let go meanwhile
                    log.warning("The effect of %s could not be measured: %s", _names(state.selected), error)
                    notice = str(error) if isinstance(error, EngineError) else ""  # as it will be with every text
                effect = None
            with self._changing() as now:
                self._effects.setdefault(state.engine, {})[state.content] = effect
                if notice and now.engine is state.engine and now.content == state.content:
                    self._state = now._replace(notice=notice)


def _check(selected: Sequence[_Selected], facts: Optional[ModelFacts]) -> None:
    """Raise unless the model can use all of these together."""
    for each in selected:
        judgement = judge(each.softprompt, facts)
        if not judgement.verdict.usable:
            raise _REFUSALS.get(judgement.verdict, SelectionError)(f"{each.filename}: {judgement.reason}")
    n_tokens = sum(each.softprompt.n_tokens for each in selected)
    if facts is not None and facts.context is not None and selected and n_tokens >= facts.context:
        raise ContextExceeded(f"{_names(selected)} would use {n_tokens} of the model's {facts.context} tokens.")


def entry_as_json(entry: Entry) -> Dict[str, Any]:
    """An entry as menus, the HTTP API and the command line tell it."""
    return {
        "filename": entry.filename,
        "name": entry.name,
        "author": entry.author,
        "description": entry.description,
        "supported": list(entry.supported),
        "n_tokens": entry.n_tokens,
        "width": entry.width,
        "verdict": str(entry.verdict),
        "reason": entry.reason,
        "usable": entry.verdict.usable,
    }


def _names(selected: Sequence[_Selected]) -> str:
    more = f" and {len(selected) - 3} more" if len(selected) > 3 else ""
    return ", ".join(each.filename for each in selected[:3]) + more
