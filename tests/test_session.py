import gc
import os
import shutil
import threading
import time

import pytest
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import attach
from kobold_sp_plugin.compatibility import ModelFacts
from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.errors import (
    CompatibilityError,
    ContextExceeded,
    EngineUnreachable,
    FormatError,
    NoModel,
    SelectionError,
    SoftPromptError,
    UnknownSoftPrompt,
)
from kobold_sp_plugin.session import Session


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_model(FAMILY)


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, "tiny")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "softprompts"
    folder.mkdir()
    softprompt(1, name="Noir", author=["A", "B"], description="Rain.", supported="tiny").save(folder / "noir.zip")
    softprompt(2, n_tokens=6, name="Space").save(folder / "space.zip")
    softprompt(3, width=64).save(folder / "wide.zip")
    (folder / "broken.zip").write_bytes(b"not a zip")
    return folder


@pytest.fixture
def session(folder, engine):
    session = Session(folder, engine)
    yield session
    session.close()


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def replace(path, softprompt):
    """As a careful program does; and never within one tick of the clock."""
    beside = path.with_suffix(".tmp")
    softprompt.save(beside)
    os.replace(beside, path)


class Heard(list):
    """The status after each change."""

    def __init__(self, session):
        super().__init__()
        session.subscribe(self.append)


class TestSelecting:
    def test_one_several_and_none(self, session, model):
        session.select("noir.zip")
        assert session.selection == ("noir.zip",)
        assert (session.n_tokens, attach(model).n_tokens) == (4, 4)
        session.select(["space.zip", "noir.zip", "space.zip"])
        assert session.selection == ("space.zip", "noir.zip", "space.zip")
        assert [each.name for each in session.softprompts] == ["Space", "Noir", "Space"]
        assert (session.n_tokens, attach(model).n_tokens) == (16, 16)
        session.select("")
        assert (session.selection, session.n_tokens, attach(model).n_tokens) == ((), 0, 0)
        session.select("noir.zip")
        session.clear()
        assert session.selection == attach(model).selection == ()

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ("absent.zip", UnknownSoftPrompt),
            ("../softprompts/noir.zip", FormatError),
            ("wide.zip", CompatibilityError),
            ("broken.zip", SelectionError),
            (["noir.zip", "wide.zip"], CompatibilityError),
            ([None], UnknownSoftPrompt),
            (["space.zip"] * 22, ContextExceeded),
        ],
    )
    def test_what_cannot_be_selected_leaves_everything_as_it_was(self, session, model, wrong, error):
        session.select("space.zip")
        with pytest.raises(error):
            session.select(wrong)
        assert session.selection == ("space.zip",)
        assert [each.name for each in attach(model).selection] == ["Space"]

    def test_an_error_says_why(self, session):
        with pytest.raises(SoftPromptError, match=r"wide\.zip: made for 64 columns, this model has 32"):
            session.select("wide.zip")

    def test_what_only_loading_finds_is_the_entrys_reason_from_then_on(self, session, folder):
        data = bytearray((folder / "noir.zip").read_bytes())
        at = data.index(b"\x93NUMPY") + 400
        data[at] ^= 1  # the member's checksum is wrong now, which no listing can see
        (folder / "noir.zip").write_bytes(data)
        assert {each.filename: each.verdict.usable for each in session.entries()}["noir.zip"]
        heard = Heard(session)
        with pytest.raises(FormatError):
            session.select("noir.zip")
        assert {each["filename"]: each["verdict"] for each in heard[-1]["entries"]}["noir.zip"] == "unreadable"

    def test_a_snapshot_is_not_touched_by_later_changes(self, session):
        session.select("noir.zip")
        taken = session.softprompts
        session.select("space.zip")
        assert [each.name for each in taken] == ["Noir"]

    def test_selecting_the_same_again_reads_no_file_and_tells_nobody(self, session):
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        taken, heard = session.softprompts, Heard(session)
        session.select("noir.zip")
        assert session.softprompts[0] is taken[0]
        assert heard == []

    def test_one_request_may_have_its_own(self, session, model):
        session.select("noir.zip")
        assert session.softprompt("space.zip").name == "Space"
        assert session.selection == ("noir.zip",)
        with pytest.raises(CompatibilityError):
            session.softprompt("wide.zip")


class TestEngines:
    def test_without_one_nothing_can_be_selected(self, folder):
        session = Session(folder)
        assert not session.takes_softprompts and session.engine is None
        assert {str(each.verdict) for each in session.entries()} == {"no model", "unreadable"}
        with pytest.raises(NoModel):
            session.select("noir.zip")
        status = session.status()
        assert (status["model"], status["context"]) == ("", None)
        session.close()

    def test_another_model_of_the_same_width_keeps_the_selection(self, session, model, tokenizer):
        session.select("noir.zip")
        other = tiny_model(FAMILY, seed=1)
        session.use(TransformersEngine(other, tokenizer, "other"))
        assert session.selection == ("noir.zip",)
        assert [each.name for each in attach(other).selection] == ["Noir"]
        assert attach(model).selection == (), "the model that is not in use any more is let go"
        assert session.status()["notice"] == ""

    def test_one_of_another_width_clears_it_and_says_why(self, session, tokenizer):
        session.select("noir.zip")
        other = tiny_model(FAMILY, **({"hidden_size": 64} if FAMILY == "llama" else {"n_embd": 64}))
        session.use(TransformersEngine(other, tokenizer, "wide model"))
        assert session.selection == ()
        assert all(part in session.status()["notice"] for part in ("noir.zip", "32", "64", "wide model"))
        session.select("wide.zip")
        assert session.status()["notice"] == ""

    def test_the_selection_outlives_the_time_between_two_models(self, session, tokenizer):
        session.select("noir.zip")
        session.use(None)
        assert session.selection == ("noir.zip",) and not session.takes_softprompts
        other = tiny_model(FAMILY, seed=1)
        session.use(TransformersEngine(other, tokenizer, "other"))
        assert [each.name for each in attach(other).selection] == ["Noir"]

    def test_a_model_that_vanishes_is_none(self, folder, tokenizer):
        model = tiny_model(FAMILY)
        session = Session(folder, TransformersEngine(model, tokenizer, "tiny"))
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        del model
        gc.collect()
        assert session.engine is None and session.status()["model"] == ""
        session.refresh()
        assert {each["verdict"] for each in session.status()["entries"]} == {"no model", "unreadable"}
        assert session.effect is None
        session.close()

    def test_a_backend_that_takes_none_says_so(self, folder):
        class Refusing:
            name, alive, context = "remote", True, None

            def facts(self):
                return ModelFacts("remote", refusal="this backend has no embeddings")

            def select(self, softprompts):
                assert not softprompts

        session = Session(folder, Refusing())
        assert not session.takes_softprompts
        with pytest.raises(SelectionError, match="no embeddings"):
            session.select("noir.zip")
        session.close()


class TestFolder:
    def test_what_appears_is_listed_and_can_be_selected_at_once(self, session, folder):
        softprompt(9, name="New").save(folder / "new.zip")
        session.select("new.zip")
        assert "new.zip" in [each.filename for each in session.entries()]

    def test_a_selected_file_that_is_replaced_is_loaded_again(self, session, folder, model):
        session.select(["space.zip", "noir.zip"])
        replace(folder / "noir.zip", softprompt(8, n_tokens=7, name="Noir 2"))
        heard = Heard(session)
        session.refresh()
        assert [each.name for each in attach(model).selection] == ["Space", "Noir 2"]
        assert heard[0]["n_tokens"] == 13 and "noir.zip was replaced" in heard[0]["notice"]

    def test_a_file_that_was_only_touched_is_no_news(self, session, folder):
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        heard = Heard(session)
        os.utime(folder / "noir.zip", (1, 1))
        session.refresh()
        assert session.status()["notice"] == ""
        assert heard == [] or all(each["selection"] == ["noir.zip"] for each in heard)

    @pytest.mark.parametrize("fate", ["deleted", "wider"])
    def test_one_that_cannot_be_used_any_more_is_taken_off_with_a_notice(self, session, folder, model, fate):
        session.select(["space.zip", "noir.zip"])
        if fate == "deleted":
            (folder / "noir.zip").unlink()
        else:
            replace(folder / "noir.zip", softprompt(8, width=64))
        session.refresh()
        assert session.selection == ("space.zip",)
        assert [each.name for each in attach(model).selection] == ["Space"]
        notice = session.status()["notice"]
        assert "noir.zip" in notice and "taken off" in notice
        replace(folder / "noir.zip", softprompt(1))
        session.refresh()
        assert session.status()["notice"] == "", "what was said is true no longer"

    def test_one_that_is_being_copied_stays_as_it_was_loaded(self, session, folder, model):
        session.select("noir.zip")
        loaded, whole = session.softprompts, (folder / "noir.zip").read_bytes()
        (folder / "noir.zip").write_bytes(whole[:300])
        session.refresh()
        assert session.selection == ("noir.zip",) and session.softprompts == loaded
        assert "stays in use" in session.status()["notice"]
        replace(folder / "noir.zip", softprompt(8, name="Copied"))
        session.refresh()
        assert [each.name for each in attach(model).selection] == ["Copied"]

    def test_too_many_at_once_are_refused_at_once(self, session):
        with pytest.raises(SelectionError, match="at most 64"):
            session.select(["noir.zip"] * 2000)

    def test_what_a_client_is_told_names_no_folder(self, session, folder):
        path = folder / "torn.zip"
        softprompt(5).save(path)
        path.write_bytes(path.read_bytes().replace(b'"sha256": "', b'"sha256": "0')[:])
        with pytest.raises(SoftPromptError) as caught:
            session.select("torn.zip")
        assert "torn.zip" in str(caught.value) and str(folder) not in str(caught.value)

    def test_a_folder_that_vanishes_takes_everything_off(self, session, folder):
        session.select("noir.zip")
        shutil.rmtree(folder)
        session.refresh()
        assert session.selection == () and session.entries() == ()

    def test_the_watcher_tells_the_listeners(self, session, folder):
        heard = Heard(session)
        session.watch()
        session.watch()
        softprompt(9, name="New").save(folder / "new.zip")
        eventually(lambda: heard)
        assert "new.zip" in [each["filename"] for each in heard[-1]["entries"]]
        session.close()
        (folder / "new.zip").unlink()
        time.sleep(0.3)
        assert len(heard) == 1

    def test_a_change_of_nothing_tells_nobody(self, session):
        heard = Heard(session)
        session.refresh()
        session.clear()
        assert heard == []


class TestEffect:
    def test_it_is_none_first_then_measured_and_told(self, session, engine):
        with engine.lock:
            session.select("noir.zip")
            assert session.status()["effect"] is None
            heard = Heard(session)
            time.sleep(0.05)
            assert session.effect is None
        eventually(lambda: heard)
        assert 0 < heard[0]["effect"] <= 1
        assert heard[0]["effect"] == pytest.approx(engine.effect(session.softprompts), abs=1e-5)

    def test_it_is_kept(self, session, engine, monkeypatch):
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        effect = session.effect
        session.select("space.zip")
        eventually(lambda: session.effect is not None)
        assert session.effect != effect
        session.select("noir.zip")
        assert session.effect == effect
        session.clear()
        assert session.effect is None

    def test_another_model_has_another(self, session, tokenizer):
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        effect, engine = session.effect, session.engine
        other = tiny_model(FAMILY, seed=1)
        session.use(TransformersEngine(other, tokenizer, "other"))
        eventually(lambda: session.effect is not None)
        assert session.effect != effect
        session.use(engine)
        assert session.effect == effect

    def test_selecting_does_not_wait_for_a_generation(self, session, engine):
        pieces = engine.generate(GenerationSettings("The door", max_length=60))
        next(pieces)
        session.select("noir.zip")
        assert session.selection == ("noir.zip",)
        pieces.close()
        eventually(lambda: session.effect is not None)

    def test_one_that_cannot_be_measured_stays_none(self, folder, engine, caplog):
        class Failing(TransformersEngine):
            def effect(self, softprompts):
                raise RuntimeError("out of memory")

        session = Session(folder, Failing(engine._existing(), engine._tokenizer, "failing"))
        session.select("noir.zip")
        eventually(lambda: "out of memory" in caplog.text)
        assert session.effect is None and session.selection == ("noir.zip",)
        session.close()

    def test_an_engine_that_does_not_answer_is_told_and_asked_again(self, folder, engine):
        is_down = [True]

        class Remote(TransformersEngine):
            def effect(self, softprompts):
                if is_down:
                    raise EngineUnreachable("No answer from http://127.0.0.1:8000.")
                return super().effect(softprompts)

        session = Session(folder, Remote(engine._existing(), engine._tokenizer, "remote"))
        session.select("noir.zip")
        eventually(lambda: session.status()["notice"] == "No answer from http://127.0.0.1:8000.")
        assert session.selection == ("noir.zip",)
        is_down.clear()
        session.select("noir.zip")
        eventually(lambda: session.effect is not None)
        assert session.status()["notice"] == ""
        session.close()


class TestListeners:
    def test_a_listener_may_use_the_session_and_may_fail(self, session, caplog):
        def failing(status):
            raise RuntimeError("a listener's fault")

        session.subscribe(failing)
        session.subscribe(lambda status: session.selection and session.clear())
        heard = Heard(session)
        session.select("noir.zip")
        assert session.selection == ()
        assert [each["selection"] for each in heard] == [[], []] or heard[-1]["selection"] == []
        assert "a listener's fault" in caplog.text

    def test_an_ended_subscription_is_silent(self, session):
        heard = []
        end = session.subscribe(heard.append)
        end()
        session.select("noir.zip")
        assert heard == []

    def test_many_threads_at_once_end_in_one_of_their_states(self, session, model, folder):
        def change(name):
            for _ in range(15):
                session.select(name)
                session.refresh()
                session.status()
                session.clear()
                session.select([name, name])

        threads = [threading.Thread(target=change, args=(name,)) for name in ("noir.zip", "space.zip")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.selection in (("noir.zip",) * 2, ("space.zip",) * 2)
        assert attach(model).selection == session.softprompts


def test_the_status_is_what_the_menu_is_told(session):
    session.select("noir.zip")
    status = session.status()
    entry = next(each for each in status["entries"] if each["filename"] == "noir.zip")
    assert status["model"] == "tiny" and status["context"] == 128 and status["n_tokens"] == 4
    assert status["selection"] == ["noir.zip"]
    reason = entry.pop("reason")
    assert "tiny" in reason
    assert entry == {
        "filename": "noir.zip",
        "name": "Noir",
        "author": "A, B",
        "description": "Rain.",
        "supported": ["tiny"],
        "n_tokens": 4,
        "width": 32,
        "verdict": "unproven",
        "usable": True,
    }
    assert [each["filename"] for each in status["entries"]] == ["broken.zip", "noir.zip", "space.zip", "wide.zip"]
