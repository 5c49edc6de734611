"""What the Client and United have in common: the table of seams, the check, and what serves an attached host."""

import contextlib
import html
import inspect
import io
import logging
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Type,
)

from ...compatibility import ModelFacts
from ...errors import NoModel, SoftPromptError
from ...menu import Menu, described
from ...patching import patch
from ...session import Session
from ...softprompt import SoftPrompt

if TYPE_CHECKING:
    from ...engines.transformers import TransformersEngine

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 60.0
"""A generation does not wait longer for its turn: that is a courtesy, and no deadlock may come of it."""
_COMMANDS = ("splistrequest", "spselect", "sprequest")
"""What the old page's menu sends."""
_FOLDER = "./softprompts/"
"""What United puts before a name to have it checked."""
_SCRIPT = Path(__file__).with_name("client.js")
_ABSENT = object()
_MISSING = {"event": "nothing handles the event {!r}", "view": "there is no view named {!r}"}


DRIVE = Path("/content/drive/MyDrive/KoboldAI/softprompts")
"""Where KoboldAI's notebooks keep soft prompts on Google Drive; they link the host's own folder to it."""


class Seam(NamedTuple):
    """One thing of the host's that the hook needs; a host that lacks one is left alone."""

    kind: str
    """"function" and "value": a global, or an attribute of one, by its dotted path. "event": the handler of a
    socket event. "view": a Flask view, by its endpoint."""
    name: str
    what: str
    """What we do with it."""
    adapter: str = ""
    """Our method around it; none where it is only used."""
    parameters: Optional[Tuple[str, ...]] = None
    """The names that its parameters must have, where they count."""


class Elsewhere:
    """Stands in a session for a backend that takes no soft prompts, so that every file's verdict says why."""

    context = None
    alive = True

    def __init__(self, name: str, refusal: str):
        self.name, self.refusal = name, refusal
        self._facts = ModelFacts(name, refusal=refusal)

    def facts(self) -> ModelFacts:
        """The refusal."""
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Take none, which is all that gets past the refusal."""

    def effect(self, softprompts: Sequence[SoftPrompt]) -> float:
        """None of them has any."""
        return 0.0

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """The host generates by itself."""
        raise NoModel(str(self._facts.refusal))


class Attachment:
    """What ``attach`` has changed in a host, and the way back; ``session`` and ``menu`` serve it.

    A host's class names its ``SEAMS`` and has the adapters, and says how to :meth:`_show` a selection. An adapter
    that fails, where neither the host's own function did nor a :class:`SoftPromptError` or one of ``answers`` was
    raised on purpose, is the end: the host is left, and its own function called.
    """

    SEAMS: ClassVar[Tuple[Seam, ...]]
    VARIABLES: ClassVar[str]
    """The global that holds the host's variables."""

    def __init__(self, host: Dict[str, Any]):
        self._host = host
        self._variables = host[self.VARIABLES]
        self._socketio = host["socketio"]
        self.answers: Tuple[Type[BaseException], ...] = (SoftPromptError, host["ValidationError"])
        # The page's own scripts are deferred in United: ours waits for them.
        script = (
            f'document.addEventListener("DOMContentLoaded", function () {{\n{_SCRIPT.read_text(encoding="utf-8")}}});'
        )
        self._script = f"<script>\n{script}\n</script>\n"
        self._loading: Optional[contextlib.ExitStack] = None
        """While the host loads: locks that are held until it is done, so that nothing is measured meanwhile."""
        self._has_left = False
        self._fixed: Tuple[List[Tuple[SoftPrompt, ...]], ...] = ()
        """What each generation under way has fixed, in a list of its own; the first one's stands."""
        self._undo = contextlib.ExitStack()
        self.session = Session(softprompts_folder())
        self._undo.callback(self.session.close)
        try:
            self.session.subscribe(self._show)  # first: when a page is told, the host's variables are set
            self.menu = Menu(self.session, self._emit)
            self._undo.callback(self.menu.close)
            self.session.watch()
            self._hook()
            self._socketio.start_background_task(self.menu.relay, self._socketio.sleep)
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Leave the host: every seam is its own again."""
        self._has_left = True
        self._undo.close()

    @property
    def _serves(self) -> bool:
        """Whether the model in use is ours; other backends keep the host's own code."""
        return not self._has_left and self.session.engine is not None

    @property
    def _engine(self) -> Optional["TransformersEngine"]:
        """The engine of the model in use, if that is one that takes soft tokens."""
        engine = self.session.engine
        return engine if engine is not None and not isinstance(engine, Elsewhere) else None  # type: ignore[return-value]

    def _hook(self) -> None:
        events = events_of(self._host)
        if "disconnect" not in events:  # the hosts have no handler of their own
            events["disconnect"] = lambda *_: None
            self._undo.callback(events.pop, "disconnect", None)
        self._undo.callback(patch(events, "disconnect", self._disconnect).undo)
        for seam in self.SEAMS:
            if seam.adapter:
                owner, name = _owner(self._host, seam)
                self._undo.callback(patch(owner, name, self._guarded(seam)).undo)

    def _guarded(self, seam: Seam) -> Callable[..., Any]:
        adapter = getattr(self, seam.adapter)

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            results: List[Any] = []
            faults: List[BaseException] = []

            def the_hosts_own(*args: Any, **kwargs: Any) -> Any:
                try:
                    results.append(original(*args, **kwargs))
                except BaseException as error:
                    faults.append(error)
                    raise
                return results[-1]

            try:
                return adapter(the_hosts_own, *args, **kwargs)
            except Exception as error:
                if isinstance(error, self.answers) or error in faults:
                    raise
                log.error(
                    "kobold_sp_plugin leaves this host: its part in %s failed (%s: %s)",
                    seam.name,
                    type(error).__name__,
                    error,
                )
                log.debug("the failure", exc_info=True)
            self._leave()
            return results[-1] if results else original(*args, **kwargs)

        return around

    def _leave(self) -> None:
        try:
            self.undo()
        except Exception:
            log.exception("kobold_sp_plugin could not take everything back")

    def _let_go(self, loading: contextlib.ExitStack) -> None:
        """Let the engine go before the host loads; a measurement has ended, and none begins before ``loading`` ends."""
        engine = self._engine
        self.session.use(None)
        if engine is None:
            return
        self._show_none()
        while not engine.lock.acquire(blocking=False):
            self._socketio.sleep(_WAIT_SECONDS)
        loading.callback(engine.lock.release)

    @contextlib.contextmanager
    def _generation(self, softprompts: Sequence[SoftPrompt]) -> Iterator[None]:
        """Fix what the host's next generation reads, and the length that its budget counts, for the ``with`` block.

        Inside another, what that one has fixed stays. Green threads may leave in another order than they came.
        """
        mine = [tuple(softprompts)]
        self._fixed = (*self._fixed, mine)
        self._show_length()
        try:
            yield
        finally:
            self._fixed = tuple(each for each in self._fixed if each is not mine)
            self._show_length()

    @property
    def _in_use(self) -> Tuple[SoftPrompt, ...]:
        """What the generation under way reads, whatever is selected meanwhile; what is selected where none is."""
        fixed = self._fixed
        return fixed[0][0] if fixed else self.session.softprompts

    def _run_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around what runs the model, in the thread that does: with the soft prompts fixed before, in its turn."""
        engine = self._engine
        if engine is None:
            return original(*args, **kwargs)
        softprompts = self._in_use
        has_turn = engine.lock.acquire(timeout=_LONGEST_WAIT_SECONDS)
        try:
            if self._has_left:  # while this waited: the model is the host's again
                return original(*args, **kwargs)
            with engine.override(softprompts):
                return original(*args, **kwargs)
        finally:
            if has_turn:
                engine.lock.release()

    @property
    def _n_tokens(self) -> int:
        """The soft tokens that the host's budget has to count."""
        return sum(softprompt.n_tokens for softprompt in self._in_use)

    # Adapters of seams that both have

    def _list(self, original: Callable[..., List[Dict[str, Any]]], model_dimension: int) -> List[Dict[str, Any]]:
        if not self._serves:
            return original(model_dimension)
        self.session.refresh()
        keys = ("filename", "name", "author", "supported", "n_tokens")
        usable = [entry for entry in self.session.status()["entries"] if entry["usable"]]
        return [{**{key: entry[key] for key in keys}, "description": described(entry)} for entry in usable]

    def _check(self, original: Callable[..., Any], filename: str, model_dimension: int) -> Any:
        if not self._serves:
            return original(filename, model_dimension)
        try:
            softprompt = self.session.softprompt(filename[len(_FOLDER) :] if filename.startswith(_FOLDER) else filename)
        except SoftPromptError as error:
            raise self._host["ValidationError"](str(error)) from error
        # As the host answers: an open file, the version of its tensor's header, shape, order and dtype.
        return io.BytesIO(), (1, 0), softprompt.rows.shape, False, softprompt.rows.dtype

    def _submit(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._engine is None:
            return original(*args, **kwargs)
        with self._generation(self.session.softprompts):
            return original(*args, **kwargs)

    def _answer_request(self, original: Callable[..., Any], body: Any) -> Any:
        filename = getattr(body, "soft_prompt", None)
        if self._engine is None or self._variables.aibusy or self._variables.genseqs:  # then it is refused
            return original(body)
        softprompts = self.session.softprompts
        if filename is not None:
            try:
                softprompts = (self.session.softprompt(filename.strip()),) if filename.strip() else ()
            except SoftPromptError as error:
                raise self._host["ValidationError"]({"soft_prompt": [str(error)]}) from error
            body.soft_prompt = None  # the host would select it, and select the user's again at the end
        with self._generation(softprompts):
            return original(body)

    def _host_emit(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        payload = args[1] if len(args) > 1 else None
        if isinstance(payload, dict) and payload.get("cmd") == "spstatitems" and self._serves:
            args = (args[0], {**payload, "data": self.menu.status_line()}, *args[2:])
        return original(*args, **kwargs)

    def _disconnect(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        self.menu.disconnected(client)
        return original(client, *args)

    def _page(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        page = original(*args, **kwargs)
        return page.replace("</body>", f"{self._script}</body>", 1) if isinstance(page, str) else page

    def _is_ours(self, args: Tuple[Any, ...]) -> bool:
        """Whether an old page's message is one of the menu's commands, and for us."""
        payload = args[0] if args else None
        return isinstance(payload, dict) and payload.get("cmd") in _COMMANDS and self._serves

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit to a client, to one of KoboldAI's rooms, or to everyone."""
        self._socketio.emit(event, payload, to=to)

    def _show(self, status: Dict[str, Any]) -> None:
        """Set the host's variables to the selection. Any thread may call this."""
        raise NotImplementedError

    def _show_length(self) -> None:
        """Set the host's variable that its budgets subtract to :attr:`_n_tokens`."""
        raise NotImplementedError

    def _show_none(self) -> None:
        """Set the host's variables to no soft prompt, whatever is selected."""
        raise NotImplementedError


def shown(status: Dict[str, Any]) -> Dict[str, Any]:
    """The first selected file's metadata, as the host's own ``spmeta`` has it; its page inserts the name as HTML."""
    filename = status["selection"][0]
    entry = next((each for each in status["entries"] if each["filename"] == filename), {"name": filename})
    meta = {key: entry.get(key, "") for key in ("author", "supported", "description")}
    meta.update(name=html.escape(entry["name"]), n_tokens=status["n_tokens"])
    return meta


def softprompts_folder() -> Path:
    """The host's ``softprompts``; the folder on Google Drive where that one is missing or has nothing in it."""
    own = Path("softprompts").absolute()
    if DRIVE.is_dir() and not (own.is_dir() and any(own.iterdir())):
        return DRIVE
    return own


def faults(host: Dict[str, Any], seams: Sequence[Seam]) -> Iterator[str]:
    """What keeps these globals from being those of a host with these seams."""
    for seam in seams:
        owner, name = _owner(host, seam)
        found = _value(owner, name)
        if found is _ABSENT:
            if owner is not _ABSENT:
                yield (
                    _MISSING[seam.kind].format(seam.name)
                    if seam.kind in _MISSING
                    else (f"there is no {seam.name}" if "." in seam.name else f"there is no global named {seam.name!r}")
                )
        elif seam.kind != "value":
            yield from _faults_of_function(seam, found)


def _faults_of_function(seam: Seam, found: Any) -> List[str]:
    if not callable(found):
        return [f"{seam.name} is no function"]
    if seam.parameters is None:
        return []
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != seam.parameters:
        return [f"{seam.name} takes ({', '.join(parameters)}), not ({', '.join(seam.parameters)})"]
    return []


def _owner(host: Dict[str, Any], seam: Seam) -> Tuple[Any, str]:
    """What holds the seam by its last name: handlers, views, the globals, a module, a class."""
    if seam.kind == "event":
        return events_of(host), seam.name
    if seam.kind == "view":
        return getattr(host.get("app"), "view_functions", {}), seam.name
    *before, name = seam.name.split(".")
    owner: Any = host
    for each in before:
        owner = _value(owner, each)
    return owner, name


def _value(owner: Any, name: str) -> Any:
    return owner.get(name, _ABSENT) if isinstance(owner, dict) else getattr(owner, name, _ABSENT)


def events_of(host: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The handlers of the host's socket events, by name; the dictionary that its server looks them up in."""
    handlers = getattr(getattr(host.get("socketio"), "server", None), "handlers", None) or {}
    events: Dict[str, Callable[..., Any]] = handlers.get("/", {})
    return events
