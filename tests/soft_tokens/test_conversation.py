"""Conversation reuse: the next turn for less, and only where it says the same."""

import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CACHE, FAMILIES, softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.soft_tokens import conversation

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if RELEASE < (4, 54):
    pytest.skip("few models of this release have a cache that can be cut", allow_module_level=True)

STORY = [1, *np.random.default_rng(0).integers(3, 131, 30).tolist()]
SAID = [17, 44, 90]


@pytest.fixture(params=[family for family in FAMILIES if family in ("llama", "gpt2", "gemma2", "bloom")])
def model(request):
    return tiny_model(request.param, eos_token_id=None)


@pytest.fixture
def llama():
    return tiny_model("llama", eos_token_id=None)


@pytest.fixture
def said(caplog):
    """What the last generation said of reuse, and of what it kept."""
    caplog.set_level(logging.DEBUG, logger="kobold_sp_plugin.soft_tokens.conversation")
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith(".conversation")][-2:]


def generate(model, ids, new=12, **options):
    """(the ids of text and continuation, scores), greedily."""
    ids = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    out = model.generate(input_ids=ids, max_new_tokens=new, output_scores=True, return_dict_in_generate=True, **options)
    return out.sequences[0].tolist(), torch.stack(out.scores)


def remembered(model, ids, new=12, **options):
    """The same, where earlier texts are remembered: (ids, scores, positions of each forward pass)."""
    handle = attach(model)
    embedding, read = model.get_input_embeddings(), []
    inner = vars(embedding)["forward"]  # ours, put aside: a hook would switch reuse off

    def forward(ids, *args, **kwargs):
        read.append(ids.shape[1])
        return inner(ids, *args, **kwargs)

    vars(embedding)["forward"] = forward
    try:
        with handle.remembering():
            ids, scores = generate(model, ids, new, **options)
    finally:
        vars(embedding)["forward"] = inner
    return ids, scores, read


def check(model, ids, new=12):
    """Both say the same; (ids, positions read)."""
    expected, scores = generate(model, ids, new)
    found, those, read = remembered(model, ids, new)
    assert found == expected
    torch.testing.assert_close(those, scores, rtol=1e-4, atol=1e-4)
    return found, read[0]


def kept(model):
    return attach(model)._adapter.conversations._kept


PROMPTS = [(), (0,), (1,), (0, 1)]


def stack(model, which):
    return [softprompt(seed, width=model.get_input_embeddings().embedding_dim) for seed in which]


# What is read


@pytest.mark.parametrize("which", PROMPTS, ids=str)
def test_a_turn_reads_what_is_new(model, which):
    attach(model).select(*stack(model, which))
    written, _ = check(model, STORY)
    for _ in range(3):
        written, read = check(model, written + SAID)
        assert read == 1 + len(SAID), "the last token was written, but not read"
    again, read = check(model, written)
    assert again[: len(written)] == written and read == 1


def test_sixty_four_tokens_are_the_same(model):
    attach(model).select(softprompt(width=model.get_input_embeddings().embedding_dim))
    written, _ = check(model, STORY)
    _, read = check(model, written + SAID, new=64)
    assert read == 4


@pytest.mark.parametrize(
    ("change", "new"),
    [
        (lambda story, written: story, 1),  # a retry
        (lambda story, written: story[:20], 1),  # back
        (lambda story, written: [*written[:25], 99, *written[26:]], 18),  # an edit in the middle
        (lambda story, written: [*story, 120, 121], 2),  # a branch
    ],
    ids=["retry", "back", "edit", "branch"],
)
def test_what_is_common_is_not_read_again(llama, change, new):
    attach(llama).select(softprompt())
    written, _ = check(llama, STORY)
    _, read = check(llama, change(STORY, written))
    assert read == new


def test_sampling_with_another_seed_begins_with_the_same(llama):
    check(llama, STORY)
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        expected = generate(llama, STORY, do_sample=True, temperature=3.0)[0]
        torch.manual_seed(seed)
        found, _, read = remembered(llama, STORY, do_sample=True, temperature=3.0)
        assert found == expected and read[0] == 1
        texts.add(tuple(found))
    assert len(texts) == 4


def test_soft_prompts_are_known_by_their_content(llama):
    handle = attach(llama)
    for seed, read in [(0, 31), (1, 31), (0, 1), (1, 1)]:
        with handle.override(SoftPrompt(softprompt(seed).rows.copy())):
            assert check(llama, STORY)[1] == read
    assert check(llama, STORY)[1] == len(STORY), "without a soft prompt it is another text"


def test_no_number_is_given_to_two_soft_prompts(llama):
    handle = attach(llama)
    for _ in range(2):
        for seed in range(6):  # more than are kept
            with handle.override(softprompt(seed)):
                check(llama, STORY, new=2)
                handle.forget() if seed == 3 else None


def test_texts_that_begin_alike_are_both_kept(llama):
    memory = STORY[:10]
    one, other = memory + [50] * 30, memory + [60] * 30
    check(llama, one)
    assert check(llama, other)[1] == 30
    assert check(llama, one)[1] == check(llama, other)[1] == 1


class Script:
    """A story that is edited; its texts are compared with those of a model that remembers nothing."""

    def __init__(self, model):
        self.model = model
        self.ids = list(STORY)
        self.before = [self.ids]

    def do(self, step):
        kind, number = step
        if kind == "append":
            self.ids = [*self.ids, *[3 + (number * each) % 120 for each in range(1, 1 + number % 6)]]
        elif kind == "edit":
            at = 1 + number % (len(self.ids) - 1)
            self.ids = [*self.ids[:at], 3 + number % 120, *self.ids[at + 1 :]]
        elif kind == "cut":
            self.ids = self.ids[: max(2, len(self.ids) - number % 20)]
        elif kind == "drop":  # as a host does when the context is full
            self.ids = [self.ids[0], *self.ids[1 + number % 5 :]] if len(self.ids) > 10 else self.ids
        elif kind == "back":
            self.ids = self.before[number % len(self.before)]
        elif kind == "prompt":
            attach(self.model).select(*stack(self.model, PROMPTS[number % len(PROMPTS)]))
        self.ids, _ = check(self.model, self.ids[-90:], new=1 + number % 5)
        self.before.append(self.ids)


STEPS = st.tuples(st.sampled_from(["append", "edit", "cut", "drop", "back", "retry", "prompt"]), st.integers(0, 1000))


@pytest.mark.parametrize("family", [each for each in ("llama", "gpt2", "gemma2") if each in FAMILIES])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(script=st.lists(STEPS, min_size=1, max_size=6))
def test_any_script_of_edits_is_exact(family, script):
    options = {"sliding_window": 48} if family == "gemma2" else {}
    told = Script(_model(family, **options))
    attach(told.model).forget()
    attach(told.model).clear()
    for step in script:
        told.do(step)
    assert len(kept(told.model)) <= conversation.MOST_CONVERSATIONS


_MODELS = {}


def _model(family, **options):
    if family not in _MODELS:
        _MODELS[family] = tiny_model(family, eos_token_id=None, **options)
    return _MODELS[family]


# Where it would not be exact, and what says so


def padded(model):
    mask = torch.ones(1, len(STORY), dtype=torch.long)
    mask[0, 0] = 0
    remembered(model, STORY, attention_mask=mask)


def in_rows(model):
    ids = torch.tensor([STORY, STORY])
    with attach(model).remembering():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


def autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        remembered(model, STORY)


def hooked(model):
    hook = model.register_forward_hook(lambda *_: None)
    remembered(model, STORY)
    hook.remove()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (padded, "a row is padded"),
        (in_rows, "it has several rows"),
        (autocast, "autocast decides the precision"),
        (hooked, "somebody has hooked LlamaForCausalLM"),
        (lambda model: remembered(model, STORY, use_cache=False), "the model is called without a cache"),
        (lambda model: remembered(model.train(), STORY), "the model is being trained"),
    ],
)
@pytest.mark.parametrize("which", [(), (0,)], ids=str)
def test_it_is_off_and_says_why(llama, said, act, reason, which):
    attach(llama).select(*stack(llama, which))
    act(llama)
    assert said() == [f"read as a whole: {reason}"]
    assert not kept(llama)


def test_positions_that_depend_on_the_length_are_read_as_a_whole(said):
    if RELEASE < (5, 0):
        pytest.skip("configurations say it in another way")
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    remembered(model, STORY)
    assert said() == ["read as a whole: its positions (dynamic) depend on the length of the text"]


def test_a_window_that_is_full_goes_on_only_where_it_stands(said):
    model = tiny_model("gemma2", eos_token_id=None, sliding_window=16)
    attach(model).select(softprompt())
    written, _ = check(model, STORY)
    longer, read = check(model, written + SAID)
    assert read == 4, "the same text, longer, is exact"
    check(model, written)
    assert check(model, longer[:-8])[1] == len(longer) - 8


def test_one_state_for_all_positions_is_not_kept(said):
    if not hasattr(transformers, "MambaConfig"):
        pytest.skip("this release has no Mamba")
    config = transformers.MambaConfig(
        vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    attach(model).select(softprompt())
    for _ in range(2):
        check(model, STORY)
    assert said()[1].startswith(("not kept: its cache has layers", "read as a whole: its cache is of the kind"))
    assert not kept(model)


def test_a_model_that_sees_what_follows_is_found_out(said):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=131
    )
    config.is_decoder = False
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    for _ in range(2):
        remembered(model, STORY)
    assert said()[-1].startswith(("not kept", "read as a whole"))
    assert not kept(model)


# What it costs, and whose it is


def test_at_most_so_many_are_kept_and_the_oldest_goes_first(llama):
    stories = [[1, *[3 + 10 * number + each % 7 for each in range(20)]] for number in range(6)]
    for story in stories[:4]:
        check(llama, story)
    check(llama, stories[0])
    for story in stories[4:]:
        check(llama, story)
    assert len(kept(llama)) == conversation.MOST_CONVERSATIONS == 4
    reads = [remembered(llama, story)[2][0] for story in (stories[0], stories[3], stories[4], stories[5])]
    assert reads == [1, 1, 1, 1]
    assert remembered(llama, stories[1])[2][0] == 20


def test_at_most_so_many_bytes_are_kept(llama, said, monkeypatch):
    check(llama, STORY)
    size = kept(llama)[0].size
    assert size == 2 * 2 * 32 * 4 * len(kept(llama)[0].tokens)  # keys and values, layers, width, float32
    monkeypatch.setattr(conversation, "MOST_BYTES", int(2.5 * size))
    for number in range(4):
        check(llama, [20 + number] * 31)
        assert sum(each.size for each in kept(llama)) <= 2.5 * size
    assert len(kept(llama)) == 2
    check(llama, [100] * 115)
    assert "bytes of keys and values are more than are kept" in said()[1]
    assert len(kept(llama)) == 2, "it has not driven the others out"


def test_a_text_that_goes_on_is_not_held_twice(llama):
    written, _ = check(llama, STORY)
    for _ in range(3):
        written, _ = check(llama, written + SAID)
    assert len(kept(llama)) == 1


def test_nothing_large_is_held_behind_a_view():
    model = tiny_model("gemma2", eos_token_id=None, sliding_window=8)
    remembered(model, STORY * 3, new=1)
    for layer in kept(model)[0].held:
        assert layer.keys.untyped_storage().nbytes() <= 2 * layer.keys.numel() * 4


def test_who_does_not_ask_for_it_keeps_nothing(llama):
    handle = attach(llama)
    handle.select(softprompt())
    generate(llama, STORY)
    assert not kept(llama)
    with handle.remembering():
        generate(llama, STORY)
    assert len(kept(llama)) == 1
    generate(llama, STORY + SAID)
    assert len(kept(llama)) == 1
    assert handle.forget() and not kept(llama) and not handle.forget()


def test_it_ends_with_the_handle(llama):
    handle = attach(llama)
    remembered(llama, STORY)
    tensors = [layer.keys for layer in kept(llama)[0].held]
    handle.detach()
    references = [len(gc.get_referrers(tensor)) for tensor in tensors]
    assert not handle._adapter.conversations._kept
    assert references == [1] * len(tensors), "the list here is all that still refers to them"
    assert not [name for name in vars(llama) if name.startswith("_kobold")]


def test_a_deleted_model_goes_with_what_was_kept():
    model = tiny_model("llama", eos_token_id=None)
    attach(model).select(softprompt())
    check(model, STORY)
    references = [weakref.ref(model), *(weakref.ref(layer.keys) for layer in kept(model)[0].held)]
    del model
    gc.collect()
    assert [each() for each in references] == [None] * 3


def test_a_cache_that_is_handed_in_is_left_to_its_owner(llama):
    cache = transformers.DynamicCache()
    check(llama, STORY)
    with attach(llama).remembering():
        first, _ = generate(llama, STORY, **{CACHE: cache})
    assert cache.get_seq_length() == len(first) - 1
    expected, _ = generate(llama, first + SAID)
    remembered(llama, [first[-1], *SAID, *STORY])  # begins as what is new does
    with attach(llama).remembering():
        assert generate(llama, first + SAID, **{CACHE: cache})[0] == expected
    assert check(llama, first + SAID)[0] == expected


# What changes the model


def test_a_model_that_changes_reads_all_again(llama):
    attach(llama).select(softprompt())
    changes = [
        lambda: next(llama.parameters()).detach().mul_(1.5),
        lambda: llama.load_state_dict({**llama.state_dict(), **{n: 0.9 * p for n, p in llama.named_parameters()}}),
        lambda: llama.double(),
        lambda: llama.float(),
    ]
    for change in changes:
        check(llama, STORY)
        with torch.no_grad():
            change()
        found, scores, read = remembered(llama, STORY)
        expected = generate(llama, STORY)
        assert found == expected[0] and read[:2] != [1, 1]
        torch.testing.assert_close(scores, expected[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_switched_reads_all_again(llama):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)).eval()
    tuned.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=4))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model = tuned.get_base_model()
    attach(tuned)
    for act in (lambda: None, lambda: tuned.set_adapter("other"), lambda: tuned.set_adapter("default")):
        act()
        tuned.eval()
        assert check(model, STORY)[1] == len(STORY)
        assert check(model, STORY)[1] == 1
    with tuned.disable_adapter():
        assert check(model, STORY)[1] == len(STORY)
    tuned.merge_adapter()
    assert check(model, STORY)[1] == len(STORY)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 16}], ids=["", "a full window"])
def test_every_tensor_is_emptied_and_the_text_is_read_again(options):
    model = tiny_model("gemma2", eos_token_id=None, **options)
    attach(model).select(softprompt())
    written, _ = check(model, STORY)
    mine = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    gc.collect()  # what other tests left, among it views that cannot be emptied
    for tensor in [each for each in gc.get_objects() if type(each) is torch.Tensor and id(each) not in mine]:
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.set_(torch.tensor([], dtype=tensor.dtype))
    longer, read = check(model, written + SAID)
    assert read == len(written) + len(SAID)
    assert check(model, longer + SAID)[1] == 4


def test_an_error_in_between_leaves_nothing_that_is_wrong(llama):
    check(llama, STORY)

    def fails(ids, scores, **kwargs):
        if ids.shape[1] > len(STORY) + 4:
            raise ZeroDivisionError
        return torch.tensor([False])

    with pytest.raises(ZeroDivisionError):
        remembered(llama, STORY + SAID, stopping_criteria=transformers.StoppingCriteriaList([fails]))
    check(llama, STORY)
    check(llama, STORY + SAID)


# Several at once


def test_threads_with_soft_prompts_of_their_own_never_mix(llama):
    handle, results, errors = attach(llama), {}, []
    handle.select(softprompt(9))

    def tell(number):
        try:
            with handle.override(*([softprompt(number)] if number else [])):
                written = STORY
                for _ in range(4):
                    with handle.remembering():
                        written = generate(llama, [*written, *SAID], new=4)[0]
                results[number] = written
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not errors
    assert len(kept(llama)) <= conversation.MOST_CONVERSATIONS
    assert len({tuple(written) for written in results.values()}) == 6
    for number, found in results.items():
        with handle.override(*([softprompt(number)] if number else [])):
            written = STORY
            for _ in range(4):
                written = generate(llama, [*written, *SAID], new=4)[0]
        assert found == written


def test_half_precision_is_no_further_from_float32_than_without():
    exact, half = tiny_model("llama"), tiny_model("llama").bfloat16()
    far = {True: [], False: []}
    for seed in range(12):
        text = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        scores = generate(exact, text, new=1)[1]
        far[False].append((generate(half, text, new=1)[1].float() - scores).norm())
        remembered(half, text[:30], new=1)
        _, rounded, read = remembered(half, text, new=1)
        assert read[0] == 10
        far[True].append((rounded.float() - scores).norm())
    assert np.mean(far[True]) <= 1.25 * np.mean(far[False])


def test_a_step_dispatches_what_the_bare_model_does(llama):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operators = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operators.append(str(func))
            return func(*args, **(kwargs or {}))

    def steps(act):
        """The operators from the third step to the last but one."""
        marks = []

        def mark(ids, scores, **kwargs):
            marks.append(len(counting.operators))
            return torch.tensor([False])

        with Counting() as counting:
            act(stopping_criteria=transformers.StoppingCriteriaList([mark]))
        return counting.operators[marks[2] : marks[-2]]

    bare = tiny_model("llama", eos_token_id=None)
    expected = steps(lambda **options: generate(bare, STORY, **options))
    remembered(llama, STORY)
    with attach(llama).remembering():
        assert steps(lambda **options: generate(llama, STORY, **options)) == expected
