import gc
import importlib
import inspect
import sys
import weakref

import pytest

from kobold_sp_plugin.patching import patch, when_imported


class Base:
    def method(self, value=1):
        return ("base", value)

    @classmethod
    def build(cls, value=1):
        return (cls.__name__, value)

    @staticmethod
    def plain(value=1):
        return ("plain", value)


class Child(Base):
    pass


def add_hundred(original, *args, **kwargs):
    return (*original(*args, **kwargs), 100)


@pytest.mark.parametrize("owner", [Base, Child])
@pytest.mark.parametrize("name", ["method", "build", "plain"])
def test_a_patched_class_is_what_it_was_after_undo(owner, name):
    before = {cls: dict(vars(cls)) for cls in (Base, Child)}
    result, signature = getattr(owner(), name)(2), inspect.signature(getattr(owner(), name))
    installed = patch(owner, name, add_hundred)
    try:
        assert getattr(owner(), name)(2) == (*result, 100)
        assert getattr(owner(), name)(value=2) == (*result, 100)
        assert inspect.signature(getattr(owner(), name)) == signature
    finally:
        installed.undo()
    assert {cls: dict(vars(cls)) for cls in (Base, Child)} == before


def test_a_class_method_keeps_the_class_it_is_called_on():
    installed = patch(Base, "build", add_hundred)
    try:
        assert Child.build(5) == ("Child", 5, 100)
        assert Base.build.__func__(Child, 5) == ("Child", 5, 100)  # as hosts call it
    finally:
        installed.undo()


def test_an_instance_is_patched_without_its_class():
    one, other = Base(), Base()
    installed = patch(one, "method", add_hundred)
    assert one.method(3) == ("base", 3, 100)
    assert other.method(3) == ("base", 3)
    assert inspect.signature(one.method) == inspect.signature(other.method)
    installed.undo()
    assert vars(one) == {}


def test_an_attribute_of_the_instance_itself_is_put_back():
    one = Base()
    one.method = own = lambda value=1: ("own", value)
    installed = patch(one, "method", add_hundred)
    assert one.method(3) == ("own", 3, 100)
    installed.undo()
    assert vars(one) == {"method": own}


def test_patched_over_it_steps_aside_and_leaves_the_other_patch():
    one = Base()
    ours = patch(one, "method", add_hundred)
    theirs = patch(one, "method", lambda original, *args: ("theirs", *original(*args)))
    ours.undo()
    assert one.method(3) == ("theirs", "base", 3)
    theirs.undo()
    assert one.method(3) == ("base", 3)


def test_a_class_patched_later_counts():
    one = Base()
    ours = patch(one, "method", add_hundred)
    theirs = patch(Base, "method", lambda original, self, value=1: ("later", value))
    try:
        assert one.method(3) == ("later", 3, 100)
    finally:
        theirs.undo()
        ours.undo()


def test_a_patch_does_not_keep_its_instance_alive():
    one = Base()
    installed = patch(one, "method", add_hundred)
    gone = weakref.ref(one)
    gc.disable()
    try:
        del one
        assert gone() is None
    finally:
        gc.enable()
    installed.undo()


def test_globals_are_patched_in_their_dictionary():
    globals_ = {"load": lambda value: ("load", value)}
    before = dict(globals_)
    installed = patch(globals_, "load", add_hundred)
    assert globals_["load"](1) == ("load", 1, 100)
    installed.undo()
    assert globals_ == before


@pytest.mark.parametrize("owner", [Base, Base(), {}])
def test_a_name_that_is_not_there_is_refused(owner):
    with pytest.raises(AttributeError):
        patch(owner, "missing", add_hundred)


@pytest.fixture
def fresh_module(tmp_path, monkeypatch):
    (tmp_path / "freshly_written.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "freshly_written"
    sys.modules.pop("freshly_written", None)


def test_a_callback_runs_once_after_the_import(fresh_module):
    before = list(sys.meta_path)
    seen = []
    when_imported(fresh_module, lambda module: seen.append(module.value))
    assert seen == []
    importlib.import_module(fresh_module)
    importlib.import_module(fresh_module)
    assert seen == [1]
    assert sys.meta_path == before


def test_a_callback_for_an_imported_module_runs_at_once(fresh_module):
    module = importlib.import_module(fresh_module)
    seen = []
    when_imported(fresh_module, seen.append)
    assert seen == [module]


def test_a_cancelled_callback_leaves_nothing_behind(fresh_module):
    before = list(sys.meta_path)
    seen = []
    when_imported(fresh_module, seen.append).cancel()
    assert sys.meta_path == before
    importlib.import_module(fresh_module)
    assert seen == []


def test_a_failing_callback_does_not_fail_the_import(fresh_module, caplog):
    when_imported(fresh_module, lambda module: 1 / 0)
    assert importlib.import_module(fresh_module).value == 1
    assert "ZeroDivisionError" in caplog.text
